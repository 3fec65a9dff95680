"""Which exports are made, and when one that failed is made again; for whoever holds a lock around it."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass

from rvmcv_worker.errors import ModelInvalidError, TimedOutError, UnsupportedJobError
from rvmcv_worker.model_exports import Key

#: Image sizes and devices of one model for which an export is made while a daemon lives; others stay with
#: torch. Each costs minutes of the whole machine, and a job may ask for any of 64 sizes.
MAX_OF_A_MODEL = 4
#: Exports that may wait for their turn, but for approved models; who comes then asks again by the next image.
MAX_WAITING = 20
#: Exports about which it is remembered that they were tried; of the oldest it is forgotten.
_MAX_REMEMBERED = 1000
#: Seconds until what failed is tried again: at first, doubled each time, and at most.
_FIRST_S, _MOST_S = 600.0, 24 * 3600.0
#: What would only happen again, with this model.
_FOR_GOOD = (ModelInvalidError, UnsupportedJobError, TimedOutError)


@dataclass
class _Try:
    failures: int = 0
    #: When it may be tried again; never, while it is under way and after it was made.
    again_s: float = math.inf


class ExportTries:
    """What was asked for since the start; times are monotonic, in seconds."""

    def __init__(self) -> None:
        #: By the names of their keys, which begin with the model's sha256; the oldest first.
        self._tries: collections.OrderedDict[str, _Try] = collections.OrderedDict()
        self._waiting: set[str] = set()

    def begin(self, key: Key, now_s: float, *, approved: bool = False) -> bool:
        """Return whether the export is to be made now; then it counts as under way until `end`."""
        name = key.directory_name
        if len(self._waiting) >= MAX_WAITING and not approved:
            return False
        if name in self._tries:
            if now_s < self._tries[name].again_s:
                return False
            self._tries[name].again_s = math.inf
        else:
            if sum(other.startswith(key.model_sha256) for other in self._tries) >= MAX_OF_A_MODEL:
                return False
            self._tries[name] = _Try()
            if len(self._tries) > _MAX_REMEMBERED:
                self._tries.popitem(last=False)
        self._waiting.add(name)
        return True

    def end(self, key: Key) -> None:
        """Note that it was made."""
        self._waiting.discard(key.directory_name)

    def fail(self, key: Key, error: Exception, now_s: float) -> None:
        """Note that it was not made, or is no more; it is tried again later unless that is of no use."""
        name = key.directory_name
        self._waiting.discard(name)
        failed = self._tries.setdefault(name, _Try())
        if not isinstance(error, _FOR_GOOD):
            failed.again_s = now_s + min(_FIRST_S * 2**failed.failures, _MOST_S)
            failed.failures = min(failed.failures + 1, 20)
