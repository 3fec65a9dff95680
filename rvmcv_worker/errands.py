"""What a signal asks of the disk, done beside the main loop: a slow disk must not look like a hung worker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from rvmcv_worker.events import Event, event


class Errands(threading.Thread):
    """One thread for the daemon's life, which does what it is given in that order."""

    def __init__(self) -> None:
        super().__init__(name="errands", daemon=True)
        self._waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    def do(self, errand: Callable[[], object]) -> None:
        """Have it done as soon as those before are; returns at once."""
        self._waiting.put(errand)

    def run(self) -> None:
        """Do one after another; a fault in one is logged and ends nothing."""
        while True:
            errand = self._waiting.get()
            try:
                errand()
            except Exception:  # noqa: BLE001 - the worker goes on, and so do the signals after this one
                event(Event.WORKER_FAULT).exception(
                    "a fault of the worker's own in what a signal asked for: it goes on"
                )
