"""The places of a lane: as many jobs as may run at once, and which GPUs each of them gets."""

from __future__ import annotations

import threading


class Slots:
    """A lane's places; each is a tuple of GPU indexes (empty on a CPU)."""

    def __init__(self, places: list[tuple[int, ...]]) -> None:
        self._free = list(places)
        self._changed = threading.Condition()

    def free(self) -> int:
        """How many places are free now."""
        with self._changed:
            return len(self._free)

    def gpus_free(self) -> int:
        """How many GPUs the free places have."""
        with self._changed:
            return sum(len(place) for place in self._free)

    def take(self) -> tuple[int, ...] | None:
        """Take a free place, or None."""
        with self._changed:
            return self._free.pop(0) if self._free else None

    def give_back(self, place: tuple[int, ...]) -> None:
        """Free a place and wake who waits for one."""
        with self._changed:
            self._free.append(place)
            self._free.sort()
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a free place; False when none came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._free), timeout_s)
