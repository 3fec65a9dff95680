"""The names of what is logged: stable words by which ops and programs find an event."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Logger


class Event(str, enum.Enum):
    """What has happened; a name never comes to mean another thing. docs/operations.md tells what to do."""

    WORKER_STARTED = "worker.started"  #: the daemon is up; its line says what it claims and behind which wall
    WORKER_STOPPING = "worker.stopping"  #: a signal asked it to stop
    WORKER_STOPPED = "worker.stopped"  #: the last line of an orderly end
    JOB_CLAIMED = "job.claimed"  #: RVM-Server gave a job to this worker


def event(name: Event, job_id: str | None = None) -> Logger:
    """Return a logger whose lines carry the event's name and, where given, the job that it is about."""
    bound = logger.bind(event=name.value)
    return bound if job_id is None else bound.bind(job_id=job_id)
