"""What this daemon has done since its start, counted; `metrics.py` shows it beside how things are now.

Safe for several threads. Every label is one of a closed set, whatever a stranger sends: no job's id, no name
and no text of somebody else's ever becomes one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, disable_created_metrics

from rvmcv_worker.answers import (
    ControllerError,
    NotFoundError,
    PollAbandonedError,
    RateLimitedError,
    RequestRejectedError,
    ServerUnavailableError,
    TokenRejectedError,
    TooLargeError,
)
from rvmcv_worker.errors import CODES, FencedError, JobError, from_code

#: The job type of what was never looked at as one: a job that does not validate, or that is another worker's.
UNKNOWN_TYPE = "unknown"
#: The code of an end without an error.
NO_CODE = "none"
#: Seconds: from an image's milliseconds to a training's days.
_JOB_BUCKETS_S = (
    *(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 1800),
    *(hours * 3600.0 for hours in (1, 2, 4, 8, 12, 24, 48, 72)),
)
_REQUEST_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
#: What an exception of a call means; the first that fits.
_OUTCOMES: tuple[tuple[type[Exception], str], ...] = (
    (FencedError, "fenced"),
    (TokenRejectedError, "token_rejected"),
    (RateLimitedError, "rate_limited"),
    (RequestRejectedError, "rejected"),
    (TooLargeError, "too_large"),
    (PollAbandonedError, "abandoned"),
    (NotFoundError, "not_found"),
    (ServerUnavailableError, "unavailable"),
    (ControllerError, "failed"),
)

Call = Literal[
    "poll",
    "claim",
    "progress",
    "finish",
    "worker_status",
    "job_uploads",
    "dataset",
    "upload_model",
    "training_complete",
]
Source = Literal["server", "storage", "https"]
StoredKind = Literal["artifact", "checkpoint", "model"]


class Tally:
    """Counts for the daemon's life."""

    def __init__(self, job_types: Iterable[str] = ()) -> None:
        # Else each counter comes with the time of its making.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry(auto_describe=False)
        self._job_types = frozenset(job_types)
        self._ends = Counter(
            "rvmcv_job_ends",
            "Attempts that ended, by the status and the error code of the final report.",
            ["job_type", "status", "code"],
            registry=registry,
        )
        self._took_s = Histogram(
            "rvmcv_job_duration_seconds",
            "How long attempts took, from the accepted claim to the wiped workspace, as a histogram.",
            ["job_type", "status"],
            buckets=_JOB_BUCKETS_S,
            registry=registry,
        )
        self._phases_s = Summary(
            "rvmcv_job_phase_duration_seconds",
            "How long the phases of attempts took: sum and count.",
            ["job_type", "phase"],
            registry=registry,
        )
        self._claims = Counter(
            "rvmcv_claims",
            "Claims that RVM-Server has answered: granted, or refused for a job that is another's or over.",
            ["lane", "outcome"],
            registry=registry,
        )
        self._requests_s = Histogram(
            "rvmcv_server_request_duration_seconds",
            "How long calls to RVM-Server took, as a histogram; a poll is held on purpose.",
            ["call", "outcome"],
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._fetched_bytes = Counter(
            "rvmcv_fetched_bytes",
            "Bytes of data sets, images, models and checkpoints that have come, those of broken tries too.",
            ["source"],
            registry=registry,
        )
        self._stored_bytes = Counter(
            "rvmcv_stored_bytes",
            "Bytes of files that storage or RVM-Server has taken.",
            ["kind"],
            registry=registry,
        )
        self._stored_files = Counter(
            "rvmcv_stored_files",
            "Files that storage or RVM-Server has taken.",
            ["kind"],
            registry=registry,
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Show what has not happened yet: of a counter that begins at 1, `increase()` does not see the 1."""
        for job_type in self._job_types:
            for status in ("completed", "cancelled", "fenced"):
                self._ends.labels(job_type, status, NO_CODE)
            for code in CODES:
                status = "queued" if from_code(code, "").handed_back else "failed"
                self._ends.labels(job_type, status, code)
        for lane in ("train", "infer", "batch"):
            for outcome in ("granted", "refused"):
                self._claims.labels(lane, outcome)
        for source in ("server", "storage", "https"):
            self._fetched_bytes.labels(source)
        for kind in ("artifact", "checkpoint", "model"):
            self._stored_bytes.labels(kind)
            self._stored_files.labels(kind)

    def ended(self, job_type: str, status: str, error_code: str | None, took_s: float | None = None) -> None:
        """Count the end of an attempt; without a duration of one that never ran, or not under this daemon."""
        known = job_type if job_type in self._job_types else UNKNOWN_TYPE
        code = NO_CODE if error_code is None else error_code if error_code in CODES else JobError.code
        self._ends.labels(known, status, code).inc()
        if took_s is not None:
            self._took_s.labels(known, status).observe(took_s)

    def phase_took(self, job_type: str, phase: str, seconds: float) -> None:
        """Count a phase that is over."""
        self._phases_s.labels(job_type, phase).observe(seconds)

    def claimed(self, lane: str, *, granted: bool) -> None:
        """Count a claim that was answered."""
        self._claims.labels(lane, "granted" if granted else "refused").inc()

    def fetched(self, source: Source, size_bytes: int) -> None:
        """Count bytes that have come."""
        self._fetched_bytes.labels(source).inc(size_bytes)

    def stored(self, kind: StoredKind, size_bytes: int) -> None:
        """Count a file that was taken."""
        self._stored_bytes.labels(kind).inc(size_bytes)
        self._stored_files.labels(kind).inc()

    @contextlib.contextmanager
    def request(self, call: Call) -> Iterator[None]:
        """Time a call to RVM-Server, and count it by what came of it."""
        start_s, outcome = time.monotonic(), "ok"
        try:
            yield
        except Exception as error:
            # What is not of the tree of answers is the end of the job that waited for the answer.
            outcome = next((word for kind, word in _OUTCOMES if isinstance(error, kind)), "abandoned")
            raise
        finally:
            self._requests_s.labels(call, outcome).observe(time.monotonic() - start_s)
