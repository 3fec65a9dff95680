"""Wakes the polls that are held when there may be something new to offer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Wakeup:
    """Any thread calls `notify`; polls wait in the event loop that was given to `bind`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: set[asyncio.Event] = set()
        #: True once the server stops: polls then answer at once.
        self.closed = False

    def bind(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Name the loop that polls wait in; None when it ends."""
        self._loop = loop

    def notify(self) -> None:
        """Wake every held poll. Called after the commit that it is about."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        """Let every held poll go."""
        self.closed = True
        self.notify()

    @contextmanager
    def waiting(self) -> Iterator[asyncio.Event]:
        """Yield an event that is set by each `notify` from here on."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            yield event
        finally:
            self._waiting.discard(event)

    def _wake(self) -> None:
        for event in self._waiting:
            event.set()
