"""The end of an attempt, and of a job: the first accepted finish decides."""

from __future__ import annotations

from sqlalchemy import select

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.activation import settle_model
from rvmcv_worker.reference.alerts import alert_of_job
from rvmcv_worker.reference.inference_logs import log_inference
from rvmcv_worker.reference.inference_tables import InferenceJob
from rvmcv_worker.reference.jobs import COUNTED_ERRORS, attempts_of, end_attempt, end_job, find_job, refusal
from rvmcv_worker.reference.leases import hold_locked, refusal_of_token
from rvmcv_worker.reference.states import FINAL, AlertKind, JobStatus
from rvmcv_worker.reference.tables import Attempt, Job, TrainingJob
from rvmcv_worker.reference.turn import Turn, hash_token

#: Hand-backs because the worker went away: the job can go on elsewhere at once.
WORKER_GONE = ("worker_stopped", "worker_died")


def finish(turn: Turn, report: wire.Finish) -> wire.Accepted:
    """Take an attempt's final report, once per ``finish_id``."""
    finish_id = str(report.finish_id)
    # Locked before the look: the same report may be on its way twice at once.
    job = find_job(turn, report.job_id, lock=True)
    if job is None:
        raise refusal(None)
    known = turn.session.scalar(select(Attempt).where(Attempt.finish_id == finish_id))
    if known is not None:
        if (known.job_id, known.lease_token_hash) != (report.job_id, hash_token(report.lease_token)):
            raise refusal_of_token(turn, job, report.lease_token)
        return wire.Accepted()
    attempt = hold_locked(turn, job, report.lease_token, to_finish=True)
    error = report.error.model_dump(exclude_none=True) if report.error else None
    attempt.finish_id = finish_id
    attempt.error = error
    attempt.timings = report.timings
    attempt.counts = False
    end_attempt(turn, attempt, report.status)
    if report.status == JobStatus.QUEUED.value:
        _hand_back(turn, job, attempt, report)
    else:
        job.result, job.error, job.timings = report.result, error, report.timings
        end_job(turn, job, JobStatus(report.status))
    if report.status == JobStatus.COMPLETED.value:
        _settle(turn, job, report)
    elif report.status == JobStatus.FAILED.value and report.error is not None:
        alert_of_job(turn, AlertKind.JOB_FAILED, job, report.error.message, {"code": report.error.code})
    return wire.Accepted()


def _hand_back(turn: Turn, job: Job, attempt: Attempt, report: wire.Finish) -> None:
    assert report.error is not None  # the wire's model sees to it
    if job.status == JobStatus.CANCELLING.value:
        end_job(turn, job, JobStatus.CANCELLED)
        return
    attempt.counts = report.error.code in COUNTED_ERRORS
    timing = turn.settings.timing
    delay_s = 0.0
    if report.error.code not in WORKER_GONE:
        first_s = timing.hand_back_delay_s if report.retry_after_s is None else report.retry_after_s
        earlier = [a for a in attempts_of(turn, job.job_id) if a.id != attempt.id and _was_put_off(a)]
        delay_s = min(first_s * 2.0 ** len(earlier), timing.hand_back_delay_limit_s)
    if report.checkpoint is not None:
        job.checkpoint = report.checkpoint.model_dump(exclude_none=True)
    job.status = JobStatus.QUEUED.value
    job.not_before = turn.now + delay_s
    job.offered_until = turn.now
    turn.wake_polls(job.job_type)


def _was_put_off(attempt: Attempt) -> bool:
    return attempt.finish_id is not None and (attempt.error or {}).get("code") not in WORKER_GONE


def _settle(turn: Turn, job: Job, report: wire.Finish) -> None:
    result = report.result or {}
    if isinstance(job, TrainingJob):
        settle_model(turn, job, result)
    elif isinstance(job, InferenceJob):
        log_inference(turn, job, result)


def cancel(turn: Turn, job_id: str) -> Job | None:
    """Cancel a job: at once while it waits, through its worker while it runs, not at all when over."""
    job = find_job(turn, job_id, lock=True)
    if job is not None and job.status == JobStatus.QUEUED.value:
        end_job(turn, job, JobStatus.CANCELLED)
    elif job is not None and job.status not in FINAL:
        job.status = JobStatus.CANCELLING.value
    return job
