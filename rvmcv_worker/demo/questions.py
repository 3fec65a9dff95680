"""Inferences asked of RVM-Server, one by one or as a batch, and waited for."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from rvmcv_worker.demo.admin import Admin
from rvmcv_worker.demo.gauge import Gauge
from rvmcv_worker.demo.report import JobReport
from rvmcv_worker.demo.stage import Stage, StageError

#: How long RVM-Server holds an answer back for the result.
WAIT_S = 5.0
POLL_EVERY_S = 0.25
#: A daemon that has not claimed an inference after this long says why in its log.
CLAIM_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What came of one inference."""

    result: dict[str, Any] | None
    error: dict[str, Any] | None
    #: From the question to the answer, as an admin sees it.
    seconds: float

    @property
    def detections(self) -> list[dict[str, Any]]:
        """What was found; nothing where there is no result."""
        found: list[dict[str, Any]] = (self.result or {}).get("detections", [])
        return found


class Questions:
    """Asks, waits, and notes how each job ended."""

    def __init__(self, stage: Stage, admin: Admin, gauge: Gauge) -> None:
        self.jobs: list[JobReport] = []
        self._stage = stage
        self._admin = admin
        self._gauge = gauge

    def ask(self, fields: dict[str, Any]) -> Answer:
        """Have one picture looked at; a job that fails is an answer too."""
        started_s = time.monotonic()
        shown = self._admin.infer(fields, WAIT_S)
        while shown["status"] not in {"completed", "failed", "cancelled"}:
            self._look_around(shown["job_id"], shown["status"], started_s)
            shown = self._admin.inference(shown["job_id"], WAIT_S)
        seconds = time.monotonic() - started_s
        self._note(shown["job_id"], seconds)
        return Answer(shown["result"], shown["error"], seconds)

    def ask_all(self, images: list[dict[str, Any]], fields: dict[str, Any]) -> dict[str, Any]:
        """Have a batch looked at; returns it as RVM-Server shows it at its end."""
        started_s = time.monotonic()
        pause = threading.Event()
        batch_id = self._admin.queue_batch(images, fields)
        while (shown := self._admin.batch(batch_id))["finished_at"] is None:
            self._look_around(batch_id, shown["status"], started_s)
            pause.wait(POLL_EVERY_S)
        for shard in shown["shards"]:
            self._note(shard["job_id"], time.monotonic() - started_s)
        return shown

    def _look_around(self, what: str, status: str, started_s: float) -> None:
        self._gauge.sample()
        self._stage.check()
        if status == "queued" and time.monotonic() - started_s > CLAIM_TIMEOUT_S:
            last = self._stage.daemon.last_lines()
            raise StageError(f"the daemon has not claimed {what}; its last lines:\n{last}")

    def _note(self, job_id: str, seconds: float) -> None:
        self._gauge.sample()
        self.jobs.append(JobReport.of(self._admin.job(job_id), seconds))
