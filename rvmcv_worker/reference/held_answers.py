"""Requests that wait for the end of a job, in the event loop: none of them holds a thread meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.concurrency import run_in_threadpool

from rvmcv_worker.reference.inference_tables import InferenceJob
from rvmcv_worker.reference.jobs import find_job
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.turn import answer_key


class HeldAnswers:
    """Holds at most so many at once; used from the event loop alone."""

    def __init__(self, queue: Queue, limit: int) -> None:
        self._queue = queue
        self._limit = limit
        #: How many are held now.
        self.held = 0

    async def wait(self, row_id: int, job_id: str, wait_s: float) -> None:
        """Return when the job has ended, when time is up, or at once when too many wait already."""
        if wait_s <= 0 or self.held >= self._limit:
            return
        self.held += 1
        try:
            await self._wait(row_id, job_id, wait_s)
        finally:
            self.held -= 1

    async def _wait(self, row_id: int, job_id: str, wait_s: float) -> None:
        ends = time.monotonic() + wait_s
        with self._queue.wakeup.waiting([answer_key(row_id)]) as news:
            while not self._queue.wakeup.closed:
                news.clear()
                if await run_in_threadpool(self._is_over, job_id):
                    return
                left_s = ends - time.monotonic()
                if left_s <= 0:
                    return
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), left_s)

    def _is_over(self, job_id: str) -> bool:
        with self._queue.look() as turn:
            job = find_job(turn, job_id)
            return isinstance(job, InferenceJob) and job.finished_at is not None
