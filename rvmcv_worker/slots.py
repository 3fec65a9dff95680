"""The places of a lane: as many jobs as may run at once, and which GPUs each of them gets."""

from __future__ import annotations

import threading


class Slots:
    """A lane's places, each for one GPU (a tuple of its index) or for none; a job may take several GPUs."""

    def __init__(self, places: list[tuple[int, ...]]) -> None:
        self._free = list(places)
        self._changed = threading.Condition()
        #: How many GPUs one job can get at most.
        self.gpus = len({gpu for place in places for gpu in place})

    def free(self) -> int:
        """How many places are free now."""
        with self._changed:
            return len(self._free)

    def gpus_free(self) -> int:
        """How many GPUs the free places have."""
        with self._changed:
            return len({gpu for place in self._free for gpu in place})

    def take(self, gpus: int = 1) -> tuple[int, ...] | None:
        """Take a free place, or so many GPUs as one place, or None where that is not to be had now."""
        with self._changed:
            chosen: list[tuple[int, ...]] = []
            for place in self._free:
                if place not in chosen and len(chosen) < gpus:
                    chosen.append(place)
            if len(chosen) < gpus:
                return None
            for place in chosen:
                self._free.remove(place)
            return tuple(gpu for place in chosen for gpu in place)

    def give_back(self, place: tuple[int, ...]) -> None:
        """Free what was taken and wake who waits for a place."""
        with self._changed:
            self._free += [(gpu,) for gpu in place] or [()]
            self._free.sort()
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a free place; False when none came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._free), timeout_s)
