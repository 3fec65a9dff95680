"""Leases: held and renewed by every accepted write, lapsed by time or by a new daemon."""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, or_, select, update

from rvmcv_worker.reference.alerts import alert_of_silent_workers
from rvmcv_worker.reference.jobs import attempts_of, end_job, find_job, refusal
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
    job = find_job(turn, job_id, lock=True)
    if job is None:
        raise refusal(None)
    return job, hold_locked(turn, job, lease_token, to_finish=to_finish)


def hold_locked(turn: Turn, job: Job, lease_token: str, *, to_finish: bool = False) -> Attempt:
    """Do the same for a job that this transaction has locked already."""
    admitted: ColumnElement[bool] = Attempt.ended_as.is_(None)
    if not to_finish:
        admitted = and_(
            admitted, or_(Attempt.lapsed_as.is_(None), Attempt.lapsed_as == Lapse.LEASE_EXPIRED.value)
        )
    attempt: Attempt | None = turn.session.scalar(
        update(Attempt)
        .where(Attempt.job_id == job.job_id, Attempt.lease_token_hash == hash_token(lease_token), admitted)
        .values(lease_until=turn.now + Attempt.lease_s)
        .returning(Attempt)
    )
    if attempt is None:
        raise refusal_of_token(turn, job, lease_token)
    if not to_finish and attempt.lapsed_as is not None:
        _take_back(job, attempt)
    return attempt


def refusal_of_token(turn: Turn, job: Job, lease_token: str) -> FencedError:
    """Return why this token does not hold this job."""
    fenced = refusal(job)
    if fenced.reason is Reason.TAKEN:
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


def lapse(turn: Turn, which: ColumnElement[bool], why: Lapse) -> None:
    """Take their jobs from these open attempts and queue them, at once and counted towards the limit."""
    wanted = and_(Attempt.ended_as.is_(None), which)
    for job_id in turn.session.scalars(select(Attempt.job_id).where(wanted).order_by(Attempt.job_id)).all():
        job = find_job(turn, job_id, lock=True)
        # Asked again under the lock: its holder may have renewed it, or finished, at this very moment.
        attempt = turn.session.scalar(select(Attempt).where(Attempt.job_id == job_id, wanted))
        if job is not None and attempt is not None:
            _lapse_one(turn, job, attempt, why)


def _lapse_one(turn: Turn, job: Job, attempt: Attempt, why: Lapse) -> None:
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
        turn.wake_polls(job.job_type)


def reap(turn: Turn) -> None:
    """Lapse every lease that ran out, and tell people of workers that have fallen silent.

    After having been away, it first gives every holder the time to show itself.
    """
    tick = turn.session.get(ReaperTick, 1, with_for_update=True)
    if tick is None:
        tick = ReaperTick(id=1, ticked_at=turn.now, back_at=turn.now)
        turn.session.add(tick)
    away_s = turn.now - tick.ticked_at
    tick.ticked_at = turn.now
    if away_s > AWAY_INTERVALS * turn.settings.timing.status_idle_s:
        tick.back_at = turn.now
        held = (Attempt.ended_as.is_(None), Attempt.lapsed_as.is_(None))
        turn.session.execute(update(Attempt).where(*held).values(lease_until=turn.now + Attempt.lease_s))
    else:
        # Before the leases, since it locks workers.
        alert_of_silent_workers(turn, back_at=tick.back_at or 0.0)
        expired = and_(Attempt.lapsed_as.is_(None), Attempt.lease_until < turn.now)
        lapse(turn, expired, Lapse.LEASE_EXPIRED)
