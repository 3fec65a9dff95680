"""The thread that looks for expired leases."""

from __future__ import annotations

import logging
import threading

from sqlalchemy.exc import SQLAlchemyError

from rvmcv_worker.reference.queue import Queue

log = logging.getLogger(__name__)


class Reaper:
    """Reaps at once, and then every so many seconds until `stop`."""

    def __init__(self, queue: Queue, every_s: float) -> None:
        self._queue = queue
        self._every_s = every_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for the end."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                self._queue.reap()
            except SQLAlchemyError:
                log.exception("the reaper could not reach the database; leases are not expired meanwhile")
            if self._stopping.wait(self._every_s):
                return
