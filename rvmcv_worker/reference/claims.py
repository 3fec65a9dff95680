"""A claim makes an attempt, once per ``claim_id``."""

from __future__ import annotations

from sqlalchemy import select

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.jobs import (
    INFERENCE_TYPES,
    end_attempt,
    fail_if_exhausted,
    find_job,
    open_attempt,
    refusal,
)
from rvmcv_worker.reference.leases import hold_locked
from rvmcv_worker.reference.states import JobStatus, Lapse, Reason
from rvmcv_worker.reference.tables import Attempt, Job
from rvmcv_worker.reference.turn import FencedError, Turn, hash_token
from rvmcv_worker.reference.workers import meet


def claim(turn: Turn, wanted: wire.Claim) -> wire.Claimed | FencedError:
    """Give the job to the caller, or say why not.

    A refusal is returned, not raised: what the claim taught about the worker and the job stays.
    """
    current = meet(turn, wanted.worker_id, str(wanted.instance_id))
    if not current:
        return FencedError(Reason.ENDED, f"a newer daemon of {wanted.worker_id} has taken over")
    job = find_job(turn, wanted.job_id, lock=True)
    if job is None:
        return refusal(None)
    known = turn.session.scalar(select(Attempt).where(Attempt.claim_id == str(wanted.claim_id)))
    if known is not None:
        return _repeated(turn, job, known, wanted)
    if job.status != JobStatus.QUEUED.value or fail_if_exhausted(turn, job):
        return refusal(job)
    return _answer(turn, job, _begin(turn, job, wanted))


def _repeated(turn: Turn, job: Job, known: Attempt, wanted: wire.Claim) -> wire.Claimed | FencedError:
    """Give a claim its old answer while its attempt may still report.

    The daemon that died before it heard the answer is asked for by its successor, which has ended that
    attempt by asking: the old answer then lets it hand the job back, and do no more.
    """
    owner = (known.job_id, known.worker_id) == (job.job_id, wanted.worker_id)
    if not owner or known.ended_as is not None:
        return FencedError(Reason.ENDED, "the attempt of this claim is over")
    if known.lapsed_as != Lapse.NEW_INSTANCE.value:
        hold_locked(turn, job, turn.lease_token(known.claim_id))
    return _answer(turn, job, known)


def _begin(turn: Turn, job: Job, wanted: wire.Claim) -> Attempt:
    earlier = open_attempt(turn, job.job_id) if job.attempt else None
    if earlier is not None:
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
