"""How an attempt begins and ends, for who reads the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rvmcv_worker.errors import InternalError, JobError, WorkerStoppedError
from rvmcv_worker.events import Event, event
from rvmcv_worker.logs import redact
from rvmcv_worker.progress_log import metric_of
from rvmcv_worker.state import Lane, RunningJob


def usual_level(lane: Lane) -> str:
    """Return at which level what goes as it should is told: inferences, many a second, say nothing of it."""
    return "DEBUG" if lane is Lane.INFER else "INFO"


def tell_claimed(job: RunningJob) -> None:
    """Tell of an accepted claim."""
    claimed = event(Event.JOB_CLAIMED, job.job_id, job_type=job.job_type, attempt=job.attempt)
    claimed.log(usual_level(job.lane), "{}, attempt {}", job.job_type, job.attempt)


def tell_completed(job_id: str, lane: Lane, took_s: float, result: Mapping[str, Any]) -> None:
    """Tell of a job that is done, with the one figure that says most of it."""
    said = f"after {took_s:.1f} s"
    details: dict[str, str | float] = {}
    if metric := metric_of(result.get("metrics")):
        details = {"metric": metric[0], "metric_value": metric[1]}
        said += f", {metric[0]} {metric[1]:.3f}"
    if isinstance(images := result.get("images_total"), int):
        details["images_total"] = images
        said += f", {images} images"
    completed = event(Event.JOB_COMPLETED, job_id, seconds=round(took_s, 3), **details)
    completed.log(usual_level(lane), "{}", said)


def tell_ended(job_id: str, error: JobError, *, fault: BaseException | None = None) -> None:
    """Tell of a job that failed or goes back, and what is to be done; `fault` is one of the worker's own."""
    name = Event.JOB_HANDED_BACK if error.handed_back else Event.JOB_FAILED
    told = event(name, job_id, error_code=error.code).opt(exception=fault)
    told.log(_level(error), "{}: {}; {}", error.code, redact(error.message), _remedy(error))


def _level(error: JobError) -> str:
    if isinstance(error, InternalError):
        return "ERROR"
    return "INFO" if isinstance(error, WorkerStoppedError) else "WARNING"


def _remedy(error: JobError) -> str:
    if isinstance(error, InternalError):
        return "please report this fault with these lines"
    return error.remedy or (
        "it is run again, nothing to do" if error.handed_back else "it is not run again: change the job"
    )
