"""The queue: each call is one transaction, and wakes held polls when it left something to offer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random

from rvmcv_worker.reference import claims, finishes, jobs, leases, offers, wire, workers
from rvmcv_worker.reference.database import Database, lost_race
from rvmcv_worker.reference.progress import take_progress
from rvmcv_worker.reference.settings import Settings
from rvmcv_worker.reference.states import JobStatus
from rvmcv_worker.reference.turn import WAKE, FencedError, Turn
from rvmcv_worker.reference.wakeup import Wakeup

Answer = TypeVar("Answer")
#: Runs a transaction anew that PostgreSQL made give way to another one.
_again = Retrying(
    retry=retry_if_exception(lost_race), stop=stop_after_attempt(10), wait=wait_random(0, 0.05), reraise=True
)


class Queue:
    """Offers, claims, leases and ends of jobs."""

    def __init__(self, database: Database, settings: Settings, wakeup: Wakeup, lease_key: bytes) -> None:
        self.wakeup = wakeup
        #: How many polls have come since the start, held or not.
        self.polls = 0
        #: Notified after every commit.
        self.changed = threading.Condition()
        self._database = database
        self._settings = settings
        self._lease_key = lease_key

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Open one transaction that writes."""
        with self._database.write() as session:
            yield Turn(session, self._database.clock(session), self._settings, self._lease_key)
            woken: set[str] = session.info.get(WAKE, set())
            if woken:
                self.wakeup.announce(session, woken)
        if woken:
            self.wakeup.notify(woken)
        with self.changed:
            self.changed.notify_all()

    @contextmanager
    def look(self) -> Iterator[Turn]:
        """Open one transaction that only reads."""
        with self._database.read() as session:
            yield Turn(session, self._database.clock(session), self._settings, self._lease_key)

    def run(self, step: Callable[[Turn], Answer]) -> Answer:
        """Run one transaction; anew when it had to give way to another one."""

        def once() -> Answer:
            with self.turn() as turn:
                return step(turn)

        return _again(once)

    def enqueue(
        self, job_type: str, config: dict[str, Any], *, priority: int = 0, job_id: str | None = None
    ) -> str:
        """Add a job and return its id."""
        with self.turn() as turn:
            return jobs.enqueue(turn, job_type, config, priority=priority, job_id=job_id).job_id

    def offer(self, poll: wire.Offer) -> tuple[list[wire.OfferedJob], float | None]:
        """Return what to offer, and in how many seconds time alone may bring something."""

        def step(turn: Turn) -> tuple[list[wire.OfferedJob], float | None]:
            current = workers.meet(turn, poll.worker_id, str(poll.instance_id))
            offered = offers.offer(turn, poll) if current else []
            return offered, None if offered else offers.next_due_s(turn, poll)

        return self.run(step)

    def claim(self, wanted: wire.Claim) -> wire.Claimed:
        """Give a job to a worker; raises `FencedError`."""
        answer = self.run(lambda turn: claims.claim(turn, wanted))
        if isinstance(answer, FencedError):
            raise answer
        return answer

    def progress(self, report: wire.ProgressReport) -> wire.Directive:
        """Take a progress report; raises `FencedError`."""
        return self.run(lambda turn: take_progress(turn, report))

    def finish(self, report: wire.Finish) -> wire.Accepted:
        """Take a final report; raises `FencedError`."""
        return self.run(lambda turn: finishes.finish(turn, report))

    def folder_of(self, job_id: str, lease_token: str) -> str:
        """Return the folder of an attempt's objects; raises `FencedError`."""

        def step(turn: Turn) -> str:
            # What is stored is inert, so an attempt may store for as long as it may finish.
            job, attempt = leases.hold(turn, job_id, lease_token, to_finish=True)
            return f"{quote(job.job_id, safe='')}/attempt-{attempt.attempt}"

        return self.run(step)

    def worker_status(self, status: wire.WorkerStatus) -> wire.WorkerOrders:
        """Take a worker's status."""
        return self.run(lambda turn: workers.take_status(turn, status))

    def cancel(self, job_id: str) -> JobStatus | None:
        """Cancel a job and return its status; None when there is no such job."""

        def step(turn: Turn) -> JobStatus | None:
            job = finishes.cancel(turn, job_id)
            return None if job is None else JobStatus(job.status)

        return self.run(step)

    def reap(self) -> None:
        """Queue the jobs whose leases ran out."""
        self.run(leases.reap)
