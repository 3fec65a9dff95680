"""Delivers final reports: each waits in the ledger until it is accepted, fenced, or seven days old."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from loguru import logger

from rvmcv_worker.controller import (
    Controller,
    ControllerError,
    RequestRejectedError,
    TooLargeError,
)
from rvmcv_worker.errors import FencedError, InternalError
from rvmcv_worker.events import Event, event
from rvmcv_worker.ledger import Ledger, OutboxRow
from rvmcv_worker.protocol import TrainingComplete
from rvmcv_worker.retry import Retry
from rvmcv_worker.state import Condition

#: Final reports that RVM-Server has not taken after this many seconds of a running daemon are given up.
KEEP_S = 7 * 24 * 3600.0
#: Final reports refused in a row that make the worker `degraded`.
_REJECTED_LIMIT = 3
#: Tries for `training-complete`, a courtesy that nothing waits for.
_COURTESY_TRIES = 3


class Outbox(threading.Thread):
    """One thread for the daemon's life; `wake` it when a report was put into the ledger."""

    def __init__(
        self, ledger: Ledger, controller: Controller, retry: Retry, condition: Condition, rejected_dir: Path
    ) -> None:
        super().__init__(name="outbox", daemon=True)
        self._ledger = ledger
        self._controller = controller
        self._retry = retry
        self._condition = condition
        self._rejected_dir = rejected_dir
        self._rejected_in_row = 0
        self._expected: set[str] = set()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._empty = threading.Condition()

    def wake(self) -> None:
        """There is something new to deliver."""
        self._wake.set()

    def expect(self, job_id: str) -> None:
        """Say nothing of a report that is accepted at once: of inferences there are many a second."""
        self._expected.add(job_id)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is left to deliver; False when that took longer than `timeout_s`."""
        self.wake()
        with self._empty:
            return self._empty.wait_for(lambda: not self._ledger.outbox(), timeout_s)

    def close(self) -> None:
        """Stop delivering; what is left waits for the next start."""
        self._closing.set()
        self._wake.set()

    def run(self) -> None:
        """Deliver what is due, oldest first; wait; again."""
        backoff = self._retry.backoff()
        since_s = time.monotonic()
        while not self._closing.is_set():
            self._wake.clear()
            try:
                self._deliver_due()
            except (ControllerError, sqlite3.Error, OSError) as error:
                # What was accepted and could not be noted is delivered again, under its `finish_id`.
                delay_s = backoff.next_s(error)
                event(Event.REPORT_WAITS).warning(
                    "final reports wait {:.0f} s: {}; nothing to do unless it stays so", delay_s, error
                )
                self._retry.pause(self._closing, delay_s, error)
                self._retry.before_retry(error)
                with contextlib.suppress(sqlite3.Error):
                    since_s = self._note_waiting(since_s)
                continue
            backoff.reset()
            with self._empty:
                self._empty.notify_all()
            self._wake.wait()
            since_s = time.monotonic()

    def _note_waiting(self, since_s: float) -> float:
        """Add the time since then to what the reports have waited; returns the moment of it."""
        now_s = time.monotonic()
        self._ledger.waited(now_s - since_s)
        return now_s

    def _deliver_due(self) -> None:
        """Deliver every report whose attempt has wiped its workspace; the others wake us when they have.

        One that RVM-Server cannot take now does not hold up the others; raises what it met.
        """
        if not self._condition.cleared.is_set():
            return  # files of the daemon before still lie there; who wipes them wakes us
        busy = {job.job_id for job in self._condition.running()}
        met: ControllerError | None = None
        for row in self._ledger.outbox():
            if row.job_id in busy:
                continue
            try:
                self._deliver(row)
            except ControllerError as error:
                met = error
                if error.status is None:  # no answer at all: the others would not get one either
                    break
        if met is not None:
            raise met

    def _deliver(self, row: OutboxRow) -> None:
        level = "DEBUG" if row.job_id in self._expected else "INFO"
        self._expected.discard(row.job_id)  # one that has to wait is news
        if row.waited_s > KEEP_S:
            event(Event.REPORT_GIVEN_UP, row.job_id).error(
                "final report given up after seven days: RVM-Server never took it; queue the job "
                "again if it is still wanted"
            )
            self._ledger.delivered(row.seq)
            return
        try:
            self._controller.finish(row.body)
        except FencedError as error:
            event(Event.REPORT_UNWANTED, row.job_id).warning(
                "final report not wanted ({}): result discarded; nothing to do", error.reason
            )
        except (RequestRejectedError, TooLargeError) as error:
            self._rejected(row, error)
            return
        else:
            accepted = event(Event.REPORT_ACCEPTED, row.job_id, status=row.body["status"])
            accepted.log(level, "{}", row.body["status"])
            self._rejected_in_row = 0
            self._condition.recover("reports")
            self._ledger.delivered(row.seq)
            self._be_courteous(row)
            return
        self._ledger.delivered(row.seq)

    def _rejected(self, row: OutboxRow, error: ControllerError) -> None:
        """Keep the refused body on disk; send a minimal one once, which ends the job at least."""
        self._rejected_dir.mkdir(mode=0o700, exist_ok=True)
        kept = self._rejected_dir / f"{row.finish_id}.json"
        kept.write_text(json.dumps(row.body, indent=1))
        kept.chmod(0o600)
        self._rejected_in_row += 1
        if self._rejected_in_row >= _REJECTED_LIMIT:
            self._condition.degrade("reports", f"RVM-Server refuses final reports: {error}", frozenset())
        if "timings" not in row.body:  # only the minimal report below goes without
            event(Event.REPORT_REFUSED, row.job_id).error(
                "RVM-Server refused even a minimal final report ({}); kept as {}, tell who runs RVM-Server",
                error,
                kept,
            )
            self._ledger.delivered(row.seq)
            return
        event(Event.REPORT_REFUSED, row.job_id).error(
            "RVM-Server refused the final report ({}); kept as {}, a minimal one follows; "
            "tell who runs RVM-Server",
            error,
            kept,
        )
        wrong = InternalError(f"RVM-Server refused the final report, kept on the worker as {kept}: {error}")
        bare: dict[str, Any] = {"status": "failed", "error": wrong.to_wire()}
        if row.body["status"] == "cancelled":  # a server may not know who cancels beside itself
            bare = {"status": "cancelled"}
        body = {
            **{key: row.body[key] for key in ("event", "job_id", "lease_token")},
            "finish_id": str(uuid.uuid4()),
            **bare,
        }
        self._ledger.replace_report(row.seq, body)
        self._wake.set()

    def _be_courteous(self, row: OutboxRow) -> None:
        if row.courtesy is None:
            return
        delays = self._retry.delays()
        for _ in range(_COURTESY_TRIES):
            try:
                self._controller.training_complete(TrainingComplete.model_validate(row.courtesy))
            except (ControllerError, FencedError) as error:
                logger.bind(job_id=row.job_id).debug(
                    "training-complete not taken, which changes nothing: {}", error
                )
            else:
                return
            if self._closing.wait(next(delays)):
                return
