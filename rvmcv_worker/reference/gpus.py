"""How many GPUs jobs ask for and workers have."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from rvmcv_worker.reference.states import JobStatus
from rvmcv_worker.reference.tables import Job, Worker
from rvmcv_worker.reference.turn import Turn

#: No worker has more, nor takes a job that asks for more.
GPUS_LIMIT = 64
#: Job types that train on one GPU: a job of these that asks for more is for the worker to refuse.
ON_ONE_GPU = ("sam2",)
#: A worker that has said nothing for so many of its intervals is taken for away.
_MISSED = 3


def gpus_of(job: Job) -> int:
    """Return how many GPUs of one worker a job needs; what is not a count is for the worker to refuse."""
    gpus = 1 if job.job_type in ON_ONE_GPU else job.config.get("gpus")
    if isinstance(gpus, int) and not isinstance(gpus, bool) and 1 <= gpus <= GPUS_LIMIT:
        return gpus
    return 1


def placeable(jobs: Sequence[Job], gpus_free: int) -> Sequence[Job]:
    """Return the jobs before the first that needs more GPUs than are free; that alone, when it is next."""
    for position, job in enumerate(jobs):
        if gpus_of(job) > max(gpus_free, 1):
            return jobs[: max(position, 1)]
    return jobs


def waits_for(turn: Turn, job: Job) -> str | None:
    """Return why no worker is offered a queued job, if it asks for more GPUs than any has."""
    wanted = gpus_of(job)
    if job.status != JobStatus.QUEUED.value or wanted == 1:
        return None
    away_s = _MISSED * max(turn.settings.timing.status_idle_s, turn.settings.timing.status_busy_s)
    shown = select(Worker).where(Worker.status.is_not(None)).order_by(Worker.worker_id)
    workers = {worker: len(worker.status["gpus"]) for worker in turn.session.scalars(shown) if worker.status}
    present = [worker for worker in workers if turn.now - worker.seen_at <= away_s]
    if any(workers[worker] >= wanted for worker in present):
        return None
    why = f"it asks for {wanted} GPUs of one worker, and no worker has {wanted}"
    if present:
        largest = max(present, key=lambda worker: workers[worker])
        why += f": the largest is {largest.worker_id} with {workers[largest] or 'none'}"
    if gone := [worker for worker in workers if workers[worker] >= wanted]:
        last = max(gone, key=lambda worker: worker.seen_at)
        ago_s = turn.now - last.seen_at
        why += f"; {last.worker_id}, which had {workers[last]}, was last seen {ago_s:.0f} s ago"
    return why
