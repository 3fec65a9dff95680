"""The database: its sessions, and its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.orm import Session

from rvmcv_worker.reference.tables import Base

#: Seconds since 1970, as the database sees it.
Clock = Callable[[Session], float]


def database_clock(session: Session) -> float:
    """Return the time of the database: its own clock, so that several servers agree on deadlines."""
    if session.get_bind().dialect.name == "postgresql":
        # Not now(), which stands still for the length of a transaction.
        return float(session.scalar(text("select extract(epoch from clock_timestamp())")) or 0.0)
    return time.time()


class Database:
    """Makes the tables and hands out transactions."""

    def __init__(self, url: str, clock: Clock = database_clock) -> None:
        #: The time that every deadline is compared with.
        self.clock = clock
        self._engine = create_engine(url, pool_pre_ping=url.startswith("postgresql"))
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        Base.metadata.create_all(self._engine)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a transaction that changes nothing and waits for nobody."""
        reader = self._engine.execution_options(deferred=True)
        with Session(reader, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a transaction that is committed at the end, or rolled back by an exception."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close every pooled connection."""
        self._engine.dispose()


def _configure_sqlite(connection: Any, _record: object) -> None:
    # The driver's own transactions would begin too late; `_begin_sqlite` begins them.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    # A commit survives the end of this process, but perhaps not a power cut: PostgreSQL is for that.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA busy_timeout = 30000")


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its lock at the start: one that first reads and then writes would fail with
    # "database is locked" instead of waiting.
    deferred = connection.get_execution_options().get("deferred", False)
    connection.exec_driver_sql("BEGIN" if deferred else "BEGIN IMMEDIATE")
