"""The final report of an attempt: how it begins, what of a fault goes into it, and what is left out."""

from __future__ import annotations

import itertools
import uuid
from typing import Any

from rvmcv_worker.config import Settings
from rvmcv_worker.errors import (
    CancelledHereError,
    JobCancelledError,
    JobError,
    WorkerDiedError,
    WorkerStoppedError,
)
from rvmcv_worker.logs import redact, redact_all
from rvmcv_worker.protocol import MAX_ERROR_CHARS

#: Seconds before a job that was handed back is offered again; RVM-Server doubles them with each time.
HAND_BACK_S = 60.0
#: Most entries of a list in the details of an error; the whole of it lies in storage.
_DETAIL_ENTRIES = 50
#: Most entries of an object that is short, and most characters of a name or a text in one.
_FLAT_ENTRIES = 100
_FLAT_CHARS = 4096


def begin(job_id: str, lease_token: str) -> dict[str, Any]:
    """Return what every final report has, under a new `finish_id`."""
    return {"event": "finish", "job_id": job_id, "lease_token": lease_token, "finish_id": str(uuid.uuid4())}


def never_ran(settings: Settings, job_id: str, lease_token: str, error: JobError) -> dict[str, Any]:
    """Return the whole report of an attempt that never ran, or whose daemon died."""
    return {**begin(job_id, lease_token), **failure(error, settings), "timings": {}}


def failure(error: JobError, settings: Settings) -> dict[str, Any]:
    """Return status, error and what else a report of a fault has."""
    body: dict[str, Any] = {
        "status": "queued" if error.handed_back else "failed",
        "error": {"code": error.code, "message": redact(error.message)[-MAX_ERROR_CHARS:]},
    }
    if error.detail:
        body["error"]["details"] = {
            key: redact_all(value[:_DETAIL_ENTRIES] if isinstance(value, list) else value)
            for key, value in error.detail.items()
        }
    if error.handed_back and not isinstance(error, (WorkerStoppedError, WorkerDiedError)):
        body["retry_after_s"] = error.retry_after_s or settings.scaled(HAND_BACK_S)
    if error.result:
        body["result"] = error.result
    return body


def cancellation(error: JobCancelledError) -> dict[str, Any]:
    """Return what a report of a cancelled job has: who cancelled it, where RVM-Server cannot know."""
    if not error.by_operator:
        return {"status": "cancelled"}
    return {"status": "cancelled", "error": CancelledHereError(error.by_operator).to_wire()}


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of a result that is too large for it.

    That is its single values, those of its metrics, and short objects that have nothing but single values;
    of a text that a child made very long nothing.
    """
    flat = {key: value for key, value in result.items() if isinstance(value, dict) and _is_flat(value)}
    metrics = {"metrics": _scalars(result["metrics"])} if "metrics" in result else {}
    return _scalars(result) | flat | metrics


def _is_flat(values: dict[str, Any]) -> bool:
    return len(values) <= _FLAT_ENTRIES and _scalars(values) == values


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    """Return the single values, no more and none longer than a report has room for."""
    short = {
        key: value
        for key, value in values.items()
        if isinstance(value, (str, int, float)) and max(len(key), len(str(value))) <= _FLAT_CHARS
    }
    return dict(itertools.islice(short.items(), _FLAT_ENTRIES))
