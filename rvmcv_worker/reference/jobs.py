"""Jobs of both tables: made, found, counted."""

from __future__ import annotations

import secrets
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Row, func, select

from rvmcv_worker.reference.alerts import alert_of_job
from rvmcv_worker.reference.batch_ends import settle_batch
from rvmcv_worker.reference.inference_tables import InferenceJob
from rvmcv_worker.reference.states import FINAL, AlertKind, JobStatus, Reason
from rvmcv_worker.reference.tables import Attempt, Job, TrainingJob, rank_of
from rvmcv_worker.reference.turn import FencedError, Turn

JOB_TABLES: tuple[type[Job], ...] = (TrainingJob, InferenceJob)
INFERENCE_TYPES = ("inference", "batch-inference")
#: Errors of a hand-back that count towards the poison limit, as an expired lease does.
COUNTED_ERRORS = ("job_crashed", "internal", "worker_died")


def enqueue(
    turn: Turn, job_type: str, config: dict[str, Any], *, priority: int, job_id: str | None = None
) -> Job:
    """Add a job to the queue."""
    job = table_of(job_type)(
        job_id=job_id or _new_job_id(job_type, turn.now),
        job_type=job_type,
        status=JobStatus.QUEUED.value,
        priority=priority,
        config=config,
        created_at=turn.now,
    )
    turn.session.add(job)
    turn.session.flush()
    turn.wake_polls(job_type)
    return job


def table_of(job_type: str) -> type[Job]:
    """Return the table that jobs of this type are kept in."""
    return InferenceJob if job_type in INFERENCE_TYPES else TrainingJob


def _new_job_id(job_type: str, now: float) -> str:
    prefix = "infer" if job_type in INFERENCE_TYPES else f"train_{job_type}"
    moment = datetime.fromtimestamp(now, timezone.utc).strftime("%Y%m%d_%H%M%S")
    return f"{prefix}_{moment}_{secrets.token_hex(4)}"


def find_job(turn: Turn, job_id: str, *, lock: bool = False) -> Job | None:
    """Return the job, locked against other writers where the caller is about to change it.

    Whoever writes to an attempt holds the lock of its job, and takes that first; whoever locks a worker
    takes it before any job; whoever locks several jobs takes them in the order of their `job_id`. So no
    two transactions wait for each other.
    """
    for table in JOB_TABLES:
        query = select(table).where(table.job_id == job_id)
        if lock:
            # What this transaction saw before it had the lock may have changed since.
            query = query.with_for_update().execution_options(populate_existing=True)
        job = turn.session.scalar(query)
        if job is not None:
            return job
    return None


def attempts_of(turn: Turn, job_id: str) -> list[Attempt]:
    """Return every attempt at a job, in order."""
    query = select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt)
    return list(turn.session.scalars(query))


def open_attempt(turn: Turn, job_id: str) -> Attempt | None:
    """Return the attempt that may still report: a job has at most one, the newest."""
    query = select(Attempt).where(Attempt.job_id == job_id, Attempt.ended_as.is_(None))
    return turn.session.scalars(query).one_or_none()


def last_hand_back(turn: Turn, job: Job | Row[Any]) -> dict[str, Any] | None:
    """Return the error with which a waiting job was last handed back; None for one that was not."""
    if job.status != JobStatus.QUEUED.value or not job.attempt:
        return None
    newest = select(Attempt.error).where(Attempt.job_id == job.job_id).order_by(Attempt.attempt.desc())
    error: dict[str, Any] | None = turn.session.scalars(newest.limit(1)).first()
    return error


def end_job(turn: Turn, job: Job, status: JobStatus) -> None:
    """Put a job into a final state; the attempt that could still have reported is over."""
    job.status = status.value
    job.finished_at = turn.now
    attempt = open_attempt(turn, job.job_id)
    if attempt is not None:
        end_attempt(turn, attempt, status.value)
    if isinstance(job, InferenceJob):
        turn.wake_answer(job.id)
        if job.batch_id is not None:
            settle_batch(turn, job.batch_id)


def end_attempt(turn: Turn, attempt: Attempt, ended_as: str) -> None:
    """Close an attempt."""
    attempt.ended_as = ended_as
    attempt.ended_at = turn.now


def fail_if_exhausted(turn: Turn, job: Job) -> bool:
    """Fail a job that was handed back too often. Asked only when it would be offered again.

    Before that moment a late result of its last attempt still counts.
    """
    attempts = attempts_of(turn, job.job_id) if job.attempt else []
    counted = [attempt for attempt in attempts if attempt.counts]
    other = [
        attempt
        for attempt in attempts
        if attempt.ended_as == JobStatus.QUEUED.value
        and not attempt.counts
        and (attempt.error or {}).get("code") != "worker_stopped"
    ]
    kind = AlertKind.JOB_FAILED
    if len(counted) >= turn.settings.poison_limit:
        kind = AlertKind.JOB_POISONED
        message = f"poisoned: {len(counted)} of its attempts ended with a lost or crashed worker or job"
    elif len(other) > turn.settings.hand_back_limit:
        message = f"handed back {len(other)} times, which is over the limit"
    else:
        return False
    last = next((attempt.error for attempt in reversed(attempts) if attempt.error), None) or {}
    job.error = {
        "code": last.get("code", "worker_died"),
        "message": f"{message}; the last error: {last.get('message', 'its lease expired')}",
        "details": {"attempts": [{"attempt": a.attempt, "error": a.error} for a in attempts if a.error]},
    }
    end_job(turn, job, JobStatus.FAILED)
    alert_of_job(turn, kind, job, job.error["message"], {"code": job.error["code"]})
    return True


def refusal(job: Job | None) -> FencedError:
    """Return why a job cannot be written to by someone who does not hold it."""
    if job is None:
        return FencedError(Reason.UNKNOWN_JOB, "no job has this id")
    if job.status == JobStatus.CANCELLED.value:
        return FencedError(Reason.CANCELLED, "the job was cancelled")
    if job.status in FINAL:
        return FencedError(Reason.FINISHED, f"the job is {job.status}")
    if job.status == JobStatus.QUEUED.value:
        return FencedError(Reason.ENDED, "this attempt is over; the job waits for its next")
    return FencedError(Reason.TAKEN, "another attempt holds the job")


def queue_position(turn: Turn, job: Job) -> int:
    """Return 1 for the waiting job that is next of its table."""
    table, ageing_s = type(job), turn.settings.timing.ageing_s
    own = job.created_at / ageing_s - job.priority
    ahead = select(func.count()).where(
        table.status == JobStatus.QUEUED.value,
        table.id != job.id,
        rank_of(table.priority, table.created_at, ageing_s) <= own,
    )
    return 1 + (turn.session.scalar(ahead) or 0)
