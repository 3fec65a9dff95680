"""What the worker must not forget: claims in progress, and final reports not yet accepted.

One SQLite file (WAL, synchronous=FULL), mode 0600 because lease tokens lie in it. Each step of a job
is written here before it happens, so a start after a crash knows what to hand back and deliver.
Schema changes are additive, so that an older worker reads a newer file; `user_version` counts them, and
the file is copied before one.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker.events import Event, event

#: How long who asks how the worker is waits for the ledger, in seconds: it may hang with its disk.
_LOOK_S = 0.5
#: The schema, one step for each version.
_SCHEMA = (
    """
CREATE TABLE IF NOT EXISTS claims (
    job_id TEXT PRIMARY KEY,
    job_type TEXT NOT NULL,
    claim_id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    attempt INTEGER,
    lease_token TEXT,
    changed_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL,
    finish_id TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL,
    courtesy TEXT,
    created_at REAL NOT NULL
);
""",
    # Seconds that a running daemon has tried to deliver the report: `created_at` follows the wall clock,
    # whose jump must not give a report up.
    "ALTER TABLE outbox ADD COLUMN waited_s REAL NOT NULL DEFAULT 0;",
)


class LedgerUnavailableError(Exception):
    """The ledger cannot be opened now; it is left as it is, for reports may lie in it."""


class ClaimState(enum.Enum):
    """How far an attempt has come, as a start after a crash needs to know it."""

    CLAIMING = "claiming"  #: the claim is on its way; whether RVM-Server accepted it is not known
    CLAIMED = "claimed"  #: the attempt is ours: fetching and preparing
    RUNNING = "running"  #: the job's child runs
    PUBLISHING = "publishing"  #: objects and model go out; inert until the final report
    STOPPED = "stopped"  #: the worker stopped, and left the hand-back to the next start
    UNKNOWN = "unknown"  #: a newer worker's step, read by an older one: begun, and more is not known

    @classmethod
    def _missing_(cls, _value: object) -> ClaimState:
        return cls.UNKNOWN


@dataclass(frozen=True)
class ClaimRow:
    """An attempt that has no final report yet."""

    job_id: str
    job_type: str
    claim_id: str
    state: ClaimState
    attempt: int | None
    lease_token: str | None


@dataclass(frozen=True)
class OutboxRow:
    """A final report that RVM-Server has not accepted yet."""

    seq: int
    job_id: str
    finish_id: str
    body: dict[str, Any]
    #: Fields of the `training-complete` call that follows the report, if any.
    courtesy: dict[str, Any] | None
    #: Seconds that running daemons have tried to deliver it.
    waited_s: float


@dataclass(frozen=True)
class Backlog:
    """What the ledger still waits for."""

    claims: int  #: attempts without a final report
    reports: int  #: final reports that RVM-Server has not accepted
    oldest_s: float  #: how long ago the oldest of these was written, by the wall clock; 0 without one


@dataclass(frozen=True)
class Waiting:
    """The jobs of claims without a final report, and those of final reports that are not accepted."""

    claims: frozenset[str]
    reports: frozenset[str]


class Ledger:
    """The daemon's memory on disk; every method is one transaction, callable from any thread."""

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        self._file = file
        try:
            self._db = self._open(file)
        except (sqlite3.OperationalError, OSError) as error:  # a full disk, a lock: it may be sound itself
            raise LedgerUnavailableError(f"the ledger {file} cannot be opened: {error}") from None
        except sqlite3.DatabaseError as error:
            aside = file.with_name(f"{file.name}.broken-{int(time.time())}")
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    file.with_name(file.name + suffix).replace(aside.with_name(aside.name + suffix))
            event(Event.LEDGER_SET_ASIDE).error(
                "ledger {} cannot be read ({}): set aside as {}, starting empty; RVM-Server takes "
                "back what ran when the leases end, keep the file for who looks into it",
                file,
                error,
                aside,
            )
            self._db = self._open(file)

    @staticmethod
    def _open(file: Path) -> sqlite3.Connection:
        _make_private(file)
        db = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode=WAL")
        (sound,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if sound != "ok":
            raise sqlite3.DatabaseError(f"damaged: {sound}")
        db.execute("PRAGMA synchronous=FULL")
        (found,) = db.execute("PRAGMA user_version").fetchone()
        if found > len(_SCHEMA):
            event(Event.LEDGER_UPGRADED).warning(
                "ledger {} was written by a newer worker (schema {}): it is used as it is; nothing to do",
                file,
                found,
            )
        elif 0 < found < len(_SCHEMA):
            _copy(db, file.with_name(f"{file.name}.schema-{found}"))
        for version, step in enumerate(_SCHEMA[found:], found + 1):
            db.executescript(f"BEGIN IMMEDIATE; {step} PRAGMA user_version={version}; COMMIT;")
        try:
            db.execute("SELECT claim_id FROM claims, outbox WHERE waited_s < 0").fetchall()
        except sqlite3.OperationalError as error:
            raise sqlite3.DatabaseError(f"not a ledger: {error}") from None
        return db

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def begin_claim(self, job_id: str, job_type: str, claim_id: str) -> None:
        """Note a claim before its request goes out."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO claims (job_id, job_type, claim_id, state, changed_at) VALUES (?, ?, ?, ?, ?)",
                (job_id, job_type, claim_id, ClaimState.CLAIMING.value, time.time()),
            )

    def claimed(self, job_id: str, attempt: int, lease_token: str) -> None:
        """Note that RVM-Server accepted the claim."""
        with self._transaction() as db:
            db.execute(
                "UPDATE claims SET state = ?, attempt = ?, lease_token = ?, changed_at = ? WHERE job_id = ?",
                (ClaimState.CLAIMED.value, attempt, lease_token, time.time(), job_id),
            )

    def enter(self, job_id: str, state: ClaimState) -> None:
        """Note the next step of an attempt before it is taken."""
        with self._transaction() as db:
            db.execute(
                "UPDATE claims SET state = ?, changed_at = ? WHERE job_id = ?",
                (state.value, time.time(), job_id),
            )

    def finish(self, job_id: str, body: dict[str, Any], courtesy: dict[str, Any] | None = None) -> None:
        """End an attempt: its final report enters the outbox as the claim leaves, in one transaction."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO outbox (job_id, finish_id, body, courtesy, created_at) VALUES (?, ?, ?, ?, ?)",
                (
                    job_id,
                    body["finish_id"],
                    json.dumps(body, allow_nan=False),
                    json.dumps(courtesy, allow_nan=False) if courtesy else None,
                    time.time(),
                ),
            )
            db.execute("DELETE FROM claims WHERE job_id = ?", (job_id,))

    def forget(self, job_id: str) -> None:
        """Drop a claim without a report: it was refused, or the attempt was fenced."""
        with self._transaction() as db:
            db.execute("DELETE FROM claims WHERE job_id = ?", (job_id,))

    def delivered(self, seq: int) -> None:
        """Drop a final report that was accepted, or that nobody wants any more."""
        with self._transaction() as db:
            db.execute("DELETE FROM outbox WHERE seq = ?", (seq,))

    def waited(self, seconds: float) -> None:
        """Note that every report has waited so much longer while a daemon ran."""
        with self._transaction() as db:
            db.execute("UPDATE outbox SET waited_s = waited_s + ?", (seconds,))

    def replace_report(self, seq: int, body: dict[str, Any]) -> None:
        """Put another body in a report's place, under the same place in the order."""
        with self._transaction() as db:
            db.execute(
                "UPDATE outbox SET body = ?, finish_id = ? WHERE seq = ?",
                (json.dumps(body, allow_nan=False), body["finish_id"], seq),
            )

    def claims(self) -> list[ClaimRow]:
        """Every attempt without a final report."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM claims ORDER BY changed_at").fetchall()
        return [
            ClaimRow(
                job_id=row["job_id"],
                job_type=row["job_type"],
                claim_id=row["claim_id"],
                state=ClaimState(row["state"]),
                attempt=row["attempt"],
                lease_token=row["lease_token"],
            )
            for row in rows
        ]

    def outbox(self) -> list[OutboxRow]:
        """Every final report that waits, oldest first."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM outbox ORDER BY seq").fetchall()
        found = []
        for row in rows:
            try:
                found.append(
                    OutboxRow(
                        seq=row["seq"],
                        job_id=row["job_id"],
                        finish_id=row["finish_id"],
                        body=json.loads(row["body"]),
                        courtesy=json.loads(row["courtesy"]) if row["courtesy"] else None,
                        waited_s=row["waited_s"],
                    )
                )
            except ValueError as error:
                self._set_aside(row, error)
        return found

    def _set_aside(self, row: sqlite3.Row, error: ValueError) -> None:
        """Take a report out that cannot be read, for a person to look at."""
        aside = self._file.with_name(f"{self._file.name}.report-{row['seq']}.broken")
        _make_private(aside)
        aside.write_text(str(dict(row)), errors="backslashreplace")
        event(Event.REPORT_GIVEN_UP, row["job_id"]).error(
            "a final report cannot be read ({}): set aside as {}; RVM-Server takes the job "
            "back when its lease ends, keep the file for who looks into it",
            error,
            aside,
        )
        self.delivered(row["seq"])

    def backlog(self, wait_s: float = _LOOK_S) -> Backlog | None:
        """Count what waits; None where the ledger cannot be read within `wait_s`: no look shall hang."""
        if not self._lock.acquire(timeout=wait_s):
            return None
        try:
            claims, reports, oldest_at = self._db.execute(
                "SELECT (SELECT count(*) FROM claims), count(*), min(created_at) FROM outbox"
            ).fetchone()
        except sqlite3.Error:
            return None
        finally:
            self._lock.release()
        return Backlog(claims, reports, max(0.0, time.time() - oldest_at) if reports else 0.0)

    def waiting(self, wait_s: float = _LOOK_S) -> Waiting | None:
        """Name the jobs that are not over; None where the ledger, hung with its disk, keeps one waiting."""
        if not self._lock.acquire(timeout=wait_s):
            return None
        try:
            claims, reports = (
                frozenset(row["job_id"] for row in self._db.execute(query))
                for query in ("SELECT job_id FROM claims", "SELECT job_id FROM outbox")
            )
        except sqlite3.Error:
            return None
        finally:
            self._lock.release()
        return Waiting(claims, reports)

    def knows(self, job_id: str) -> bool:
        """Whether the job is claimed here or its final report still waits: it is not claimed again."""
        with self._lock:
            found = self._db.execute(
                "SELECT 1 FROM claims WHERE job_id = :id UNION ALL SELECT 1 FROM outbox WHERE job_id = :id",
                {"id": job_id},
            ).fetchone()
        return found is not None

    def close(self) -> None:
        """Close the file; nothing is lost, each step was committed."""
        with self._lock:
            self._db.close()


def _make_private(file: Path) -> None:
    """Make a file, and whatever SQLite keeps beside it, for this user alone: lease tokens lie in it."""
    os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            file.with_name(file.name + suffix).chmod(0o600)


def _copy(db: sqlite3.Connection, file: Path) -> None:
    """Copy the whole database, as it is before its schema changes."""
    file.unlink(missing_ok=True)
    _make_private(file)
    with contextlib.closing(sqlite3.connect(file)) as copy:
        db.backup(copy)
    event(Event.LEDGER_UPGRADED).info("the ledger as the worker before has left it is kept as {}", file)
