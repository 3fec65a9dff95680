"""What may be late: storage is asked for, the model store is trimmed, repeated events are summed up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rvmcv_worker.attempt import Services
from rvmcv_worker.events import Event, event
from rvmcv_worker.state import Lane

#: Why a training delivers less than it could.
NO_STORAGE = (
    "no storage: no MinIO keys here and no job-uploads at RVM-Server; trainings keep no checkpoints and"
    " deliver best.pt by upload-model only"
)
#: The same of a lane whose results are too large for a report.
NO_BATCHES = "batch-inference is not claimed: its results need storage"


def check_storage(services: Services) -> None:
    """Tell where results have no storage to go to: it limits what is delivered, and stops the batch lane."""
    storage, condition = services.storage, services.condition
    lacking = not storage.can_store and storage.lacking
    if condition.note("storage", NO_STORAGE if lacking else None):
        if lacking:
            event(Event.STORAGE_MISSING).warning("{}; give the worker MinIO's keys if it should", NO_STORAGE)
        else:
            event(Event.STORAGE_FOUND).info("there is storage for results now")
    if lacking and "batch-inference" in services.settings.worker.job_types:
        if condition.degrade("storage", NO_BATCHES, frozenset({Lane.BATCH})):
            event(Event.STORAGE_MISSING).warning(
                "{}: give the worker MinIO's keys, or take it out of [worker] job_types", NO_BATCHES
            )
    else:
        condition.recover("storage")


class Housekeeping(threading.Thread):
    """One thread for the daemon's life, on the monotonic clock.

    A scheduler on the wall clock falls silent when that jumps back, and counts every run that it missed when
    it jumps forward: 56 years of them at a machine that starts without a clock.
    """

    def __init__(self, services: Services, tell_held_back: Callable[[], object]) -> None:
        """`tell_held_back` sums up events that repeat themselves."""
        super().__init__(name="housekeeping", daemon=True)
        scaled = services.settings.scaled
        #: Each with its interval in seconds.
        self._chores: tuple[tuple[float, Callable[[], object]], ...] = (
            (scaled(60.0), lambda: check_storage(services)),
            (scaled(600.0), services.model_store.trim),
            (scaled(60.0), tell_held_back),
        )
        self._closing = threading.Event()

    def run(self) -> None:
        """Do each chore at once, and then at its interval."""
        due_s = [time.monotonic()] * len(self._chores)
        while not self._closing.wait(max(0.0, min(due_s) - time.monotonic())):
            for number, (every_s, chore) in enumerate(self._chores):
                if time.monotonic() < due_s[number]:
                    continue
                try:
                    chore()
                except Exception:  # noqa: BLE001 - it may be late, so it may be done the next time
                    event(Event.WORKER_FAULT).exception(
                        "a fault of the worker's own in the housekeeping: it goes on; please report it "
                        "with these lines"
                    )
                due_s[number] = time.monotonic() + every_s

    def close(self) -> None:
        """Do nothing more."""
        self._closing.set()
