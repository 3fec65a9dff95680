"""A claim makes an attempt, once per ``claim_id``."""

from __future__ import annotations

from sqlalchemy import select

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.jobs import (
    INFERENCE_TYPES,
    attempts_of,
    end_attempt,
    fail_if_exhausted,
    find_job,
    refusal,
)
from rvmcv_worker.reference.leases import hold
from rvmcv_worker.reference.states import JobStatus, Reason
from rvmcv_worker.reference.tables import Attempt, Job
from rvmcv_worker.reference.turn import FencedError, Turn, hash_token
from rvmcv_worker.reference.workers import meet


def claim(turn: Turn, wanted: wire.Claim) -> wire.Claimed | FencedError:
    """Give the job to the caller, or say why not.

    A refusal is returned, not raised: what the claim taught about the worker and the job stays.
    """
    current = meet(turn, wanted.worker_id, str(wanted.instance_id))
    job = find_job(turn, wanted.job_id, lock=True)
    if job is None:
        return refusal(None)
    claim_id = str(wanted.claim_id)
    known = turn.session.scalar(select(Attempt).where(Attempt.claim_id == claim_id))
    if known is not None:
        return _repeated(turn, wanted)
    if not current:
        return FencedError(Reason.ENDED, f"a newer daemon of {wanted.worker_id} has taken over")
    if job.status != JobStatus.QUEUED.value or fail_if_exhausted(turn, job):
        return refusal(job)
    return _answer(turn, job, _begin(turn, job, wanted))


def _repeated(turn: Turn, wanted: wire.Claim) -> wire.Claimed | FencedError:
    try:
        job, attempt = hold(turn, wanted.job_id, turn.lease_token(str(wanted.claim_id)))
    except FencedError:
        return FencedError(Reason.ENDED, "the attempt of this claim is over")
    return _answer(turn, job, attempt)


def _begin(turn: Turn, job: Job, wanted: wire.Claim) -> Attempt:
    for earlier in attempts_of(turn, job.job_id) if job.attempt else []:
        end_attempt(turn, earlier, earlier.lapsed_as or Reason.ENDED.value)
    timing = turn.settings.timing
    lease_s = timing.lease_infer_s if job.job_type in INFERENCE_TYPES else timing.lease_train_s
    attempt = Attempt(
        job_id=job.job_id,
        attempt=job.attempt + 1,
        claim_id=str(wanted.claim_id),
        lease_token_hash=hash_token(turn.lease_token(str(wanted.claim_id))),
        worker_id=wanted.worker_id,
        instance_id=str(wanted.instance_id),
        lease_s=lease_s,
        lease_until=turn.now + lease_s,
        claimed_at=turn.now,
        last_seq=-1,
        counts=False,
    )
    turn.session.add(attempt)
    job.attempt = attempt.attempt
    job.status = JobStatus.PROCESSING.value
    job.started_at = job.started_at or turn.now
    return attempt


def _answer(turn: Turn, job: Job, attempt: Attempt) -> wire.Claimed:
    return wire.Claimed(
        lease_token=turn.lease_token(attempt.claim_id),
        attempt=attempt.attempt,
        lease_s=attempt.lease_s,
        report_interval_s=turn.settings.timing.report_interval_s,
        resume=wire.Resume(**job.checkpoint) if job.checkpoint else None,
    )
