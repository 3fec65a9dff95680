"""What an engine finds in its `in/`: copies of models from the store, and exports of them."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from pathlib import Path

from loguru import logger

from rvmcv_worker import workspace


class EngineFiles:
    """Files beneath an engine's `in/`, copied when they are first asked for; safe for several threads.

    The engine can only read them, so they outlast an engine that is replaced. With more than `limit_bytes`
    those used least recently go, but none that a request needs now.
    """

    def __init__(self, in_dir: Path, limit_bytes: int) -> None:
        self._in_dir = in_dir
        self._limit_bytes = limit_bytes
        self._placing = threading.Lock()
        #: Held for moments only: an engine's own thread waits for it.
        self._lock = threading.Lock()
        #: Bytes by path below `in/`, used least recently first.
        self._held: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._users: collections.Counter[str] = collections.Counter()

    def take(self, name: str, place: Callable[[Path], None]) -> str:
        """Have `name`, a path below `in/`, put there by `place` if it is not; returns it as engines see it.

        It stays until `give_back`. Raises what `place` raises.
        """
        if not self._taken(name):
            with self._placing:
                if not self._taken(name):
                    self._place(name, place)
        return f"in/{name}"

    def _taken(self, name: str) -> bool:
        """Take `name` if it is there."""
        with self._lock:
            if name not in self._held:
                return False
            self._held.move_to_end(name)
            self._users[name] += 1
            return True

    def _place(self, name: str, place: Callable[[Path], None]) -> None:
        path = self._in_dir / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            place(path)
        except BaseException:
            workspace.wipe(path)
            raise
        size_bytes = workspace.measure(path).bytes if path.is_dir() else path.stat().st_size
        with self._lock:
            self._held[name] = size_bytes
            self._users[name] += 1
            self._trim()

    def give_back(self, name: str) -> None:
        """Say that a request which took `name` is over."""
        with self._lock:
            self._users[name] -= 1
            self._trim()

    def drop_unused(self) -> None:
        """Remove all that no request needs now; what is asked for again is put there again."""
        with self._lock:
            for name in [name for name in self._held if not self._users[name]]:
                del self._held[name]
                workspace.wipe(self._in_dir / name)

    def _trim(self) -> None:
        total_bytes = sum(self._held.values())
        for name in list(self._held)[:-1]:
            if total_bytes <= self._limit_bytes:
                return
            if not self._users[name]:
                total_bytes -= self._held.pop(name)
                workspace.wipe(self._in_dir / name)
                logger.debug("engine: {} dropped from its directory", name)
