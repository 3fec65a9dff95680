"""Where a batch left off: an object in storage from which the next attempt goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rvmcv_worker.batch_summary import BatchSummary
from rvmcv_worker.events import Event, event
from rvmcv_worker.protocol import Sha256

_VERSION = 1
#: Largest one that is fetched, in bytes: it names every part.
MAX_BYTES = 16 * 1024 * 1024

Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A finished part, as the job's result names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: Sha256
    images: Count


class BatchCheckpoint(BaseModel):
    """All that the rest of the batch needs to know of what is done."""

    model_config = ConfigDict(extra="forbid")

    version: int = _VERSION
    #: What the results depend on; another list, model or option makes another batch.
    batch_sha256: Sha256
    next_index: Count = 0
    parts: list[Part] = []
    summary: BatchSummary = Field(default_factory=BatchSummary)


def batch_sha256(list_sha256: str, asked: dict[str, Any]) -> str:
    """Return what tells one batch from another: its list, and what is asked of which models."""
    text = json.dumps({"list": list_sha256, "asked": asked}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path | None, sha256: str, images_total: int) -> BatchCheckpoint:
    """Return what an earlier attempt left of the batch `sha256`; without it, or another's, a fresh one."""
    fresh = BatchCheckpoint(batch_sha256=sha256)
    if path is None:
        return fresh
    try:
        found = BatchCheckpoint.model_validate_json(path.read_bytes())
        _check(found, sha256, images_total)
    except ValidationError as error:
        event(Event.JOB_STARTED_OVER).warning(
            "the checkpoint is no batch's ({} faults): the job starts over; nothing to do",
            error.error_count(),
        )
        return fresh
    except ValueError as error:
        event(Event.JOB_STARTED_OVER).warning(
            "the checkpoint is not this batch's: {}; the job starts from the beginning, nothing to do", error
        )
        return fresh
    return found


def _check(found: BatchCheckpoint, sha256: str, images_total: int) -> None:
    done = sum(part.images for part in found.parts)
    if found.version != _VERSION:
        raise ValueError(f"it has version {found.version}, not {_VERSION}")
    if found.batch_sha256 != sha256:
        raise ValueError("list, model or options have changed since")
    counted = found.summary.images_ok + found.summary.images_failed
    if not found.next_index == done == counted or done > images_total:
        raise ValueError(
            f"its parts have {done} images, it counts {counted} and goes on at {found.next_index}"
        )
