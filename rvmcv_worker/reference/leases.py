"""Leases: held and renewed by every accepted write, lapsed by time or by a new daemon."""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, or_, select, update

from rvmcv_worker.reference.jobs import attempts_of, end_attempt, end_job, find_job, refusal
from rvmcv_worker.reference.states import JobStatus, Lapse, Reason
from rvmcv_worker.reference.tables import Attempt, Job, ReaperTick
from rvmcv_worker.reference.turn import FencedError, Turn, hash_token

#: After this many missed status intervals the reaper holds that it was away.
AWAY_INTERVALS = 3


def hold(turn: Turn, job_id: str, lease_token: str, *, to_finish: bool = False) -> tuple[Job, Attempt]:
    """Renew the lease that this token belongs to, and return its job and attempt, both locked.

    The token is compared in the statement that writes. Raises `FencedError` when it no longer holds the
    job; `to_finish` admits also the attempt of a daemon that was started anew.
    """
    admitted: ColumnElement[bool] = Attempt.ended_as.is_(None)
    if not to_finish:
        admitted = and_(
            admitted, or_(Attempt.lapsed_as.is_(None), Attempt.lapsed_as == Lapse.LEASE_EXPIRED.value)
        )
    renewed = turn.session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.lease_token_hash == hash_token(lease_token), admitted)
        .values(lease_until=turn.now + Attempt.lease_s)
        .returning(Attempt.id)
    ).scalar()
    job = find_job(turn, job_id, lock=True)
    if job is None or renewed is None:
        raise refusal_of_token(turn, job, lease_token)
    attempt = turn.session.get_one(Attempt, renewed)
    if not to_finish and attempt.lapsed_as is not None:
        _take_back(job, attempt)
    return job, attempt


def refusal_of_token(turn: Turn, job: Job | None, lease_token: str) -> FencedError:
    """Return why this token does not hold this job."""
    fenced = refusal(job)
    if fenced.reason is Reason.TAKEN and job is not None:
        newest = attempts_of(turn, job.job_id)[-1]
        if newest.lease_token_hash == hash_token(lease_token):
            return FencedError(Reason.ENDED, "this attempt is over")
    return fenced


def _take_back(job: Job, attempt: Attempt) -> None:
    """Undo an expiry that nobody has made use of: the holder is alive after all."""
    attempt.lapsed_as = None
    attempt.counts = False
    attempt.error = None
    job.status = JobStatus.PROCESSING.value


def lapse(turn: Turn, attempt: Attempt, why: Lapse) -> None:
    """Take the job from its attempt and queue it again, at once and counted towards the limit."""
    job = find_job(turn, attempt.job_id, lock=True)
    if job is None:
        end_attempt(turn, attempt, why.value)
        return
    message = {
        Lapse.LEASE_EXPIRED: f"the lease of {attempt.worker_id} expired",
        Lapse.NEW_INSTANCE: f"the daemon of {attempt.worker_id} was started anew",
    }[why]
    attempt.lapsed_as = why.value
    attempt.counts = True
    attempt.error = {"code": "worker_died", "message": message}
    if job.status == JobStatus.CANCELLING.value:
        end_job(turn, job, JobStatus.CANCELLED)
    elif job.status == JobStatus.PROCESSING.value:
        job.status = JobStatus.QUEUED.value
        job.not_before = turn.now
        job.offered_until = turn.now
        turn.wake_polls()


def reap(turn: Turn) -> None:
    """Lapse every lease that ran out.

    After having been away, it first gives every holder the time to show itself.
    """
    tick = turn.session.get(ReaperTick, 1, with_for_update=True)
    if tick is None:
        tick = ReaperTick(id=1, ticked_at=turn.now)
        turn.session.add(tick)
    away_s = turn.now - tick.ticked_at
    tick.ticked_at = turn.now
    held = (Attempt.ended_as.is_(None), Attempt.lapsed_as.is_(None))
    if away_s > AWAY_INTERVALS * turn.settings.timing.status_idle_s:
        turn.session.execute(update(Attempt).where(*held).values(lease_until=turn.now + Attempt.lease_s))
        return
    for attempt in turn.session.scalars(select(Attempt).where(*held, Attempt.lease_until < turn.now)):
        lapse(turn, attempt, Lapse.LEASE_EXPIRED)
