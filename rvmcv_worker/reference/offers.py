"""Which jobs a poll is offered. An offer claims nothing."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, and_, exists, func, or_, select

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.activation import active_model
from rvmcv_worker.reference.jobs import fail_if_exhausted, table_of, urgency
from rvmcv_worker.reference.states import JobStatus
from rvmcv_worker.reference.tables import Attempt, Job, TrainingJob
from rvmcv_worker.reference.times import rfc3339
from rvmcv_worker.reference.turn import Turn


def offer(turn: Turn, poll: wire.Offer) -> list[wire.OfferedJob]:
    """Return up to ``slots`` jobs, the most urgent first, and keep them from other workers for a moment."""
    offered: list[Job] = []
    for table in _tables(poll):
        # More than is asked for: some of them may need more GPUs or be over their limits.
        query = (
            select(table)
            .where(_wanted(turn, table, poll))
            .order_by(urgency(turn, table).desc(), table.created_at, table.id)
            .limit(poll.slots + 20)
            .with_for_update(skip_locked=True)
        )
        for job in turn.session.scalars(query):
            if len(offered) == poll.slots:
                break
            if _fits(job, poll) and not fail_if_exhausted(turn, job):
                job.offered_to = poll.worker_id
                job.offered_until = turn.now + turn.settings.timing.offer_hold_s
                offered.append(job)
    return [
        wire.OfferedJob(
            job_id=job.job_id,
            id=job.id,
            job_type=job.job_type,
            priority=job.priority,
            created_at=rfc3339(job.created_at),
            config=_config_of(turn, job),
        )
        for job in offered
    ]


def _config_of(turn: Turn, job: Job) -> dict[str, Any]:
    """Return what is offered: a training learns of the active model, to be measured beside it."""
    if not isinstance(job, TrainingJob) or "active_model_sha256" in job.config:
        return job.config
    active = active_model(turn, job.job_type)
    return job.config if active is None else {**job.config, "active_model_sha256": active.sha256_hash}


def next_due_s(turn: Turn, poll: wire.Offer) -> float | None:
    """Return in how many seconds a queued job of these types may become free by time alone."""
    moments = [
        turn.session.scalar(
            select(func.min(column)).where(
                table.status == JobStatus.QUEUED.value,
                table.job_type.in_(poll.job_types.split(",")),
                column > turn.now,
            )
        )
        for table in _tables(poll)
        for column in (table.not_before, table.offered_until)
    ]
    return min((moment - turn.now for moment in moments if moment is not None), default=None)


def _tables(poll: wire.Offer) -> set[type[Job]]:
    return {table_of(job_type) for job_type in poll.job_types.split(",")}


def _wanted(turn: Turn, table: type[Job], poll: wire.Offer) -> ColumnElement[bool]:
    held_by_asker = exists().where(
        Attempt.job_id == table.job_id,
        Attempt.instance_id == str(poll.instance_id),
        Attempt.ended_as.is_(None),
    )
    return and_(
        table.status == JobStatus.QUEUED.value,
        table.job_type.in_(poll.job_types.split(",")),
        table.not_before <= turn.now,
        or_(table.offered_until <= turn.now, table.offered_to == poll.worker_id),
        # Its lease ran out, but it is still at work: its result is to be waited for.
        ~held_by_asker,
    )


def _fits(job: Job, poll: wire.Offer) -> bool:
    wanted = job.config.get("gpus", 1)
    # What is not a number is for the worker to refuse.
    return not isinstance(wanted, int) or wanted <= max(poll.gpus_free, 1)
