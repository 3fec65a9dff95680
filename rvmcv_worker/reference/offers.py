"""Which jobs a poll is offered. An offer claims nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import Integer, Select, Text, bindparam, case, cast, exists, func, or_, select

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.activation import active_model
from rvmcv_worker.reference.gpus import GPUS_LIMIT, ON_ONE_GPU, placeable
from rvmcv_worker.reference.jobs import JOB_TABLES, fail_if_exhausted, table_of
from rvmcv_worker.reference.states import JobStatus
from rvmcv_worker.reference.tables import Attempt, Job, Seconds, TrainingJob, rank_of
from rvmcv_worker.reference.times import rfc3339
from rvmcv_worker.reference.turn import Turn

#: After so long a poll that passed a locked job by looks again.
PASSED_BY_S = 0.1


def offer(turn: Turn, poll: wire.Offer) -> list[wire.OfferedJob]:
    """Return up to ``slots`` jobs, the most urgent first, and keep them from other workers for a moment.

    A job that the worker has the GPUs for, but not free now, is offered when it is next, and by itself: the
    worker then keeps what becomes free for it, or it would wait behind smaller ones for ever.
    """
    tables = _tables(poll)
    offered = [job for table in tables for job in _take(turn, table, poll)]
    if len(tables) > 1:
        ageing_s = turn.settings.timing.ageing_s
        offered.sort(key=lambda job: (job.created_at / ageing_s - job.priority, job.created_at, job.id))
        del offered[poll.slots :]
    offered = list(placeable(offered, poll.gpus_free))
    for job in offered:
        job.offered_to = poll.worker_id
        job.offered_until = turn.now + turn.settings.timing.offer_hold_s
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


def _take(turn: Turn, table: type[Job], poll: wire.Offer) -> list[Job]:
    """Lock up to ``slots`` jobs of one table, passing by those that another poll is being offered."""
    taken: list[Job] = []
    query = _query(turn, table, poll).with_for_update(skip_locked=True)
    while len(taken) < poll.slots:
        # No more than are offered: what is locked for nothing would be withheld from the others.
        limit = poll.slots - len(taken)
        found = turn.session.scalars(query, _asked(turn, poll, limit, [job.id for job in taken])).all()
        taken += [job for job in found if not fail_if_exhausted(turn, job)]
        if len(found) < limit:
            break
    return taken


def _config_of(turn: Turn, job: Job) -> dict[str, Any]:
    """Return what is offered: a training learns of the active model, to be measured beside it."""
    if not isinstance(job, TrainingJob) or "active_model_sha256" in job.config:
        return job.config
    active = active_model(turn, job.job_type)
    return job.config if active is None else {**job.config, "active_model_sha256": active.sha256_hash}


def next_due_s(turn: Turn, poll: wire.Offer) -> float | None:
    """Return in how many seconds a queued job of these types may become free without a word of it."""
    moments: list[float | None] = []
    for table in _tables(poll):
        query = _query(turn, table, poll)
        if turn.session.scalars(query, _asked(turn, poll, 1, [])).first() is not None:
            # Another transaction has it locked, which may come to nothing.
            return PASSED_BY_S
        columns = (table.not_before, table.offered_until)
        found = turn.session.execute(
            select(*(func.min(case((column > turn.now, column))) for column in columns)).where(
                table.status == JobStatus.QUEUED.value, table.job_type.in_(poll.job_types.split(","))
            )
        )
        moments += found.one()
    return min((moment - turn.now for moment in moments if moment is not None), default=None)


def _tables(poll: wire.Offer) -> list[type[Job]]:
    wanted = {table_of(job_type) for job_type in poll.job_types.split(",")}
    return [table for table in JOB_TABLES if table in wanted]


def _query(turn: Turn, table: type[Job], poll: wire.Offer) -> Select[Job]:
    return _offerable(table, max(poll.gpus_free, poll.gpus), turn.settings.timing.ageing_s)


@cache  # to build it takes longer than to run it
def _offerable(table: type[Job], gpus: int, ageing_s: float) -> Select[Job]:
    too_many = [str(count) for count in range(max(gpus, 1) + 1, GPUS_LIMIT + 1)]
    held_by_asker = exists().where(
        Attempt.job_id == table.job_id,
        Attempt.instance_id == bindparam("instance_id"),
        Attempt.ended_as.is_(None),
    )
    now = bindparam("now", type_=Seconds)
    return (
        select(table)
        .where(
            table.status == JobStatus.QUEUED.value,
            table.job_type.in_(bindparam("job_types", expanding=True)),
            table.not_before <= now,
            or_(table.offered_until <= now, table.offered_to == bindparam("worker_id")),
            # Its lease ran out, but it is still at work: its result is to be waited for.
            ~held_by_asker,
            # As JSON text: what is not a number is for the worker to refuse.
            or_(
                table.job_type.in_(ON_ONE_GPU),
                func.coalesce(cast(table.config["gpus"], Text), "1").not_in(too_many),
            ),
            table.id.not_in(bindparam("taken", expanding=True)),
        )
        .order_by(rank_of(table.priority, table.created_at, ageing_s), table.created_at, table.id)
        .limit(bindparam("slots", type_=Integer))
    )


def _asked(turn: Turn, poll: wire.Offer, slots: int, taken: list[int]) -> dict[str, Any]:
    return {
        "job_types": poll.job_types.split(","),
        "worker_id": poll.worker_id,
        "instance_id": str(poll.instance_id),
        "now": turn.now,
        "slots": slots,
        "taken": taken,
    }
