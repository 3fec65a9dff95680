"""Wakes the polls that are held when there may be something new to offer them.

On PostgreSQL the word reaches every server on the database, by ``LISTEN`` and ``NOTIFY``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

import psycopg
from sqlalchemy import func, select
from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

CHANNEL = "rvmcv_jobs_queued"
#: Between tries to listen again; held polls still answer when their `wait` is over.
LISTEN_AGAIN_S = 1.0


class Wakeup:
    """Any thread tells; polls wait in the event loop that runs `heeding`."""

    def __init__(self, listen_to: str | None = None) -> None:
        #: The PostgreSQL that is shared with other servers, as a libpq URL; None for a database of our own.
        self._listen_to = listen_to
        self._own_name = secrets.token_hex(8)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[asyncio.Event, frozenset[str]] = {}
        #: True once the server stops: polls then answer at once.
        self.closed = False

    def announce(self, session: Session, job_types: Iterable[str]) -> None:
        """Tell the other servers once this transaction has committed."""
        if self._listen_to is not None:
            told = f"{self._own_name} {','.join(sorted(job_types))}"
            session.execute(select(func.pg_notify(CHANNEL, told)))

    def notify(self, job_types: Iterable[str] | None = None) -> None:
        """Wake this server's polls for these types, or all. Called after the commit that it is about."""
        wanted = None if job_types is None else frozenset(job_types)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, wanted)

    def close(self) -> None:
        """Let every held poll go."""
        self.closed = True
        self.notify()

    @contextmanager
    def waiting(self, job_types: Iterable[str]) -> Iterator[asyncio.Event]:
        """Yield an event that is set by each word of one of these types from here on."""
        event = asyncio.Event()
        self._waiting[event] = frozenset(job_types)
        try:
            yield event
        finally:
            del self._waiting[event]

    @asynccontextmanager
    async def heeding(self) -> AsyncIterator[None]:
        """Wake polls in this event loop, and listen to the other servers."""
        self._loop = asyncio.get_running_loop()
        listener = asyncio.create_task(self._listen(self._listen_to)) if self._listen_to is not None else None
        try:
            yield
        finally:
            self._loop = None
            if listener is not None:
                listener.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await listener

    def _wake(self, job_types: frozenset[str] | None = None) -> None:
        for event, wanted in self._waiting.items():
            if job_types is None or not wanted.isdisjoint(job_types):
                event.set()

    async def _listen(self, url: str) -> None:
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    # For what was told while nobody listened.
                    self._wake()
                    async for told in connection.notifies():
                        teller, _, job_types = told.payload.partition(" ")
                        if teller != self._own_name:
                            self._wake(frozenset(job_types.split(",")))
            except psycopg.Error as error:
                log.warning("not told of jobs that other servers queue, until PostgreSQL is back: %s", error)
            await asyncio.sleep(LISTEN_AGAIN_S)
