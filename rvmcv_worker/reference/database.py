"""The database: its sessions, and its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateColumn

from rvmcv_worker.reference import inference_tables  # noqa: F401 - its tables are made too
from rvmcv_worker.reference.tables import Base

#: Seconds since 1970, as the database sees it.
Clock = Callable[[Session], float]

#: Connections of one server to PostgreSQL, besides the one that listens. A held poll has none while it
#: waits, and more transactions at once than this only get into each other's way.
POOL_SIZE = 20
#: Held while the tables are made: two servers that start at once would both try.
TABLES_LOCK = 0x72766D6376
#: serialization_failure, deadlock_detected, unique_violation.
LOST_RACES = ("40001", "40P01", "23505")


def database_clock(session: Session) -> float:
    """Return the time of the database: its own clock, so that several servers agree on deadlines."""
    if session.get_bind().dialect.name == "postgresql":
        # Not now(), which stands still for the length of a transaction.
        return float(session.scalar(text("select extract(epoch from clock_timestamp())")) or 0.0)
    return time.time()


def lost_race(error: BaseException) -> bool:
    """Return whether PostgreSQL gave way to another transaction: this one may do when it runs again."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in LOST_RACES


class DatabaseUnusableError(ConnectionError):
    """The database cannot be reached, or cannot be this server's."""


class Database:
    """Makes the tables and hands out transactions. Raises `DatabaseUnusableError`."""

    def __init__(self, url: str, clock: Clock = database_clock) -> None:
        #: The time that every deadline is compared with.
        self.clock = clock
        try:
            self._engine = _make_engine(url)
            with self._engine.begin() as connection:
                if self._engine.dialect.name == "postgresql":
                    connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": TABLES_LOCK})
                Base.metadata.create_all(connection)
                _add_missing_columns(connection)
        except OperationalError as error:
            raise DatabaseUnusableError(f"cannot use the database: {error.orig}") from error
        except (ArgumentError, NoSuchModuleError) as error:
            raise DatabaseUnusableError(f"not a database's URL, as SQLAlchemy writes it: {error}") from error

    @property
    def postgres_url(self) -> str | None:
        """Return the URL for libpq; None when this is not PostgreSQL."""
        if self._engine.dialect.name != "postgresql":
            return None
        return self._engine.url.set(drivername="postgresql").render_as_string(hide_password=False)

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


def _add_missing_columns(connection: Connection) -> None:
    """Bring tables that an older version made up to date: what came since may be null, or has a default."""
    for table in Base.metadata.sorted_tables:
        there = {column["name"] for column in inspect(connection).get_columns(table.name)}
        missing = [column for column in table.columns if column.name not in there]
        for column in missing:
            definition = CreateColumn(column).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {definition}")
        for index in table.indexes:
            if any(column in missing for column in index.columns):
                index.create(connection)


def _make_engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(parsed, pool_pre_ping=True, pool_size=POOL_SIZE, max_overflow=0)
        event.listen(engine, "connect", _configure_postgresql)
        return engine
    engine = create_engine(parsed)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_postgresql(connection: Any, _record: object) -> None:
    # The index on the rank gives queued jobs in their order. A planner that has not heard of them yet (they
    # may be minutes old and ten thousand) takes them for few, and would fetch and sort all for one offer.
    connection.execute("SET enable_bitmapscan = off")
    connection.commit()


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
