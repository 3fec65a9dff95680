"""Workers as they show themselves: one daemon of each name at a time."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import and_, or_

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.alerts import alert_of_failed_worker
from rvmcv_worker.reference.leases import hold, lapse
from rvmcv_worker.reference.states import JobStatus, Lapse
from rvmcv_worker.reference.tables import Attempt, Worker
from rvmcv_worker.reference.turn import FencedError, Turn

#: Past instances that are remembered per worker.
INSTANCES_KEPT = 100
#: `seen_at` is no finer than this, so that not every call writes.
SEEN_STEP_S = 1.0


def meet(turn: Turn, worker_id: str, instance_id: str) -> bool:
    """Note that this daemon called, and return whether it is the current one of its name.

    A new one ends what the old one held. An old one that calls again (a late request, or a second
    daemon of the same name) ends nothing; it is counted and shown to admins.
    """
    worker = turn.session.get(Worker, worker_id, with_for_update=True)
    if worker is None:
        # Its lanes call at once at the very start; on PostgreSQL the one that comes second runs again.
        turn.session.add(
            Worker(worker_id=worker_id, instance_id=instance_id, seen_at=turn.now, desired_state="run")
        )
        turn.session.flush()
        return True
    if instance_id in worker.past_instances:
        worker.alternations += 1
        return False
    if turn.now - worker.seen_at >= SEEN_STEP_S:
        worker.seen_at = turn.now
    if instance_id != worker.instance_id:
        worker.past_instances = [*worker.past_instances, worker.instance_id][-INSTANCES_KEPT:]
        worker.instance_id = instance_id
        worker.alternations = 0
        displaced = and_(
            Attempt.worker_id == worker_id,
            Attempt.instance_id != instance_id,
            or_(Attempt.lapsed_as.is_(None), Attempt.lapsed_as != Lapse.NEW_INSTANCE.value),
        )
        lapse(turn, displaced, Lapse.NEW_INSTANCE)
    return True


def take_status(turn: Turn, status: wire.WorkerStatus) -> wire.WorkerOrders:
    """Store what the worker shows of itself, renew the leases that it names, and answer with orders."""
    current = meet(turn, status.worker_id, str(status.instance_id))
    worker = turn.session.get_one(Worker, status.worker_id)
    if current:
        # Without its leases: they hold secrets.
        worker.status = status.model_dump(mode="json", exclude={"leases"})
        if status.failure:
            alert_of_failed_worker(turn, status.worker_id, str(status.instance_id), status.failure)
    timing = turn.settings.timing
    leases = sorted(status.leases, key=lambda lease: lease.job_id)
    return wire.WorkerOrders(
        leases={lease.job_id: _renew(turn, lease) for lease in leases},
        desired_state=worker.desired_state,
        interval_s=wire.StatusIntervals(idle=timing.status_idle_s, busy=timing.status_busy_s),
        superseded=not current,
    )


def _renew(turn: Turn, lease: wire.Lease) -> Literal["ok", "cancel", "lost"]:
    try:
        job, _attempt = hold(turn, lease.job_id, lease.lease_token)
    except FencedError:
        return "lost"
    return "cancel" if job.status == JobStatus.CANCELLING.value else "ok"
