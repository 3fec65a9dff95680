"""Models kept in memory until it is short; the one used least recently goes first."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from pathlib import Path
from typing import Protocol, TypeVar, cast

from rvmcv_worker.compute import engine_faults
from rvmcv_worker.errors import ModelInvalidError

#: Models that did not load, of which it is remembered why.
_MAX_REFUSED = 256


class Loaded(Protocol):
    """What the cache keeps."""

    @property
    def memory_bytes(self) -> int:
        """About how much memory it takes."""
        ...


LoadedT = TypeVar("LoadedT", bound=Loaded)


def resident_bytes() -> int:
    """Return the memory of this process that is resident."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def give_back_memory() -> None:
    """Return what is free in this process, and on its GPU, to the system."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed blocks else, and the limit counts them


class ModelCache:
    """Models by key, used by one thread; one that is in use never goes.

    Memory is short when the models' estimates together, or what is resident of the process, is more than
    `limit_bytes`.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        resident: Callable[[], int] = resident_bytes,
        give_back: Callable[[], None] = give_back_memory,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._resident = resident
        self._give_back = give_back
        self._models: OrderedDict[Hashable, Loaded] = OrderedDict()
        #: Why a model did not load, by key: a file is named by its sha256, so it never will.
        self._refused: OrderedDict[Hashable, str] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._models

    def peek(self, key: Hashable) -> Loaded | None:
        """Return the model, if it is there, without counting it as used."""
        return self._models.get(key)

    def get(self, key: Hashable, load: Callable[[], LoadedT]) -> LoadedT:
        """Return the model of `key`, loaded if it is not there; it is now the one used last.

        Raises what `load` raises; a `ModelInvalidError` again without another try.
        """
        if key in self._refused:
            self._refused.move_to_end(key)
            raise ModelInvalidError(self._refused[key])
        if key not in self._models:
            try:
                self._models[key] = load()
            except ModelInvalidError as error:
                # Where memory or the disk made a loader call it bad, it may be good the next time.
                passing = engine_faults.is_out_of_memory(engine_faults.behind(error))
                if not (passing or isinstance(error.__cause__, OSError)):
                    self._refuse(key, error.message)
                raise
        self._models.move_to_end(key)
        return cast("LoadedT", self._models[key])

    def _refuse(self, key: Hashable, why: str) -> None:
        self._refused[key] = why
        if len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)

    def trim(self, in_use: Collection[Hashable]) -> list[Hashable]:
        """Drop models, least recently used first, until memory is not short; returns their keys."""
        dropped: list[Hashable] = []
        while self._is_short() and (key := self._least_recent(in_use)) is not None:
            del self._models[key]
            self._give_back()
            dropped.append(key)
        return dropped

    def drop_all_but(self, in_use: Collection[Hashable]) -> None:
        """Drop every model that is not in use."""
        for key in [key for key in self._models if key not in in_use]:
            del self._models[key]
        self._give_back()

    def _is_short(self) -> bool:
        estimate_bytes = sum(model.memory_bytes for model in self._models.values())
        return max(estimate_bytes, self._resident()) > self._limit_bytes

    def _least_recent(self, in_use: Collection[Hashable]) -> Hashable | None:
        return next((key for key in self._models if key not in in_use), None)
