"""The places of a lane: as many jobs as may run at once, and which GPUs each of them gets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection


class Slots:
    """A lane's places, each for one GPU (a tuple of its index) or for none; a job may take several GPUs."""

    def __init__(
        self, places: list[tuple[int, ...]], unfit: Callable[[], Collection[int]] = frozenset
    ) -> None:
        self._places = list(places)
        self._free = list(places)
        self._unfit = unfit
        self._changed = threading.Condition()

    @property
    def gpus(self) -> int:
        """How many GPUs one job can get at most."""
        return len({gpu for place in self._places for gpu in place})

    @property
    def count(self) -> int:
        """How many places there are, taken and unfit ones too."""
        with self._changed:
            return len(self._places)

    def free(self) -> int:
        """How many places are free now."""
        with self._changed:
            return len(self._usable())

    def gpus_free(self) -> int:
        """How many GPUs the free places have."""
        with self._changed:
            return len({gpu for place in self._usable() for gpu in place})

    def gpus_fit(self) -> int:
        """How many GPUs one job can get at most while those that are unfit stay so."""
        return len({gpu for place in self._places for gpu in place} - frozenset(self._unfit()))

    def take(self, gpus: int = 1) -> tuple[int, ...] | None:
        """Take a free place, or so many GPUs as one place, or None where that is not to be had now."""
        with self._changed:
            if not (chosen := self._chosen(gpus)):
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

    def wait(self, timeout_s: float, gpus: int = 1) -> bool:
        """Wait until `take` has a place; False when none came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._chosen(gpus)), timeout_s)

    def add(self, places: list[tuple[int, ...]]) -> None:
        """Add places for GPUs that have come; a GPU that is lost keeps its own."""
        with self._changed:
            self._places += places
            self._free = sorted(self._free + places)
            self._changed.notify_all()

    def _chosen(self, gpus: int) -> list[tuple[int, ...]]:
        """Return free places of so many GPUs, or one without; none where there are fewer."""
        chosen: list[tuple[int, ...]] = []
        for place in self._usable():
            if place not in chosen and len(chosen) < gpus:
                chosen.append(place)
        return chosen if len(chosen) == gpus else []

    def _usable(self) -> list[tuple[int, ...]]:
        unfit = frozenset(self._unfit())
        return [place for place in self._free if unfit.isdisjoint(place)]
