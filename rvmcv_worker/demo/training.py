"""A training of the demo, followed to its end, and what it brought."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from rvmcv_worker.demo.admin import Admin
from rvmcv_worker.demo.gauge import Gauge
from rvmcv_worker.demo.report import Delivery, JobReport
from rvmcv_worker.demo.stage import Stage, StageError
from rvmcv_worker.demo.watch import Watch
from rvmcv_worker.reference.client import ClientError

POLL_EVERY_S = 0.25
#: An idle daemon claims at once; one that has not after this long says why in its log.
CLAIM_TIMEOUT_S = 60.0
CANCEL_TIMEOUT_S = 15.0
#: Below the folder of a training's model: what it left beside that, but for the pictures to look at first.
ARTIFACTS_DIR = "training"
PICTURES = frozenset({"results.png", "masks.jpg", "curves.png"})


def train(stage: Stage, admin: Admin, gauge: Gauge, console: Console, job_id: str, epochs: int) -> JobReport:
    """Show a queued training until it has ended; Ctrl-C cancels it."""
    started_s = time.monotonic()
    try:
        with Watch(console, epochs) as watch:
            job = _follow(stage, admin, gauge, watch, job_id)
    except KeyboardInterrupt:
        _cancel(admin, job_id)
        raise
    return JobReport.of(job, time.monotonic() - started_s)


def fetch(admin: Admin, job: JobReport, out_dir: Path) -> Delivery | None:
    """Bring what a training stored into `out_dir`; None without a model."""
    result = job.result or {}
    artifacts = out_dir / ARTIFACTS_DIR
    artifacts.mkdir(parents=True, exist_ok=True)
    for name, path in result.get("artifacts", {}).items():
        admin.fetch(path, (out_dir if name in PICTURES else artifacts) / name)
    if job.status != "completed":
        return None
    row = admin.model_row(result["version"])
    stored_sha256 = admin.download_model(result["version"], out_dir / "best.pt")
    return Delivery(result["version"], row["sha256_hash"] if row else None, stored_sha256)


def _follow(stage: Stage, admin: Admin, gauge: Gauge, watch: Watch, job_id: str) -> dict[str, Any]:
    """Return the job once it has ended."""
    pause = threading.Event()
    waiting_until_s = time.monotonic() + CLAIM_TIMEOUT_S
    while True:
        job = admin.job(job_id)
        watch.show(job)
        gauge.sample()
        if job["finished_at"] is not None:
            return job
        stage.check()
        if job["status"] == "queued" and time.monotonic() > waiting_until_s:
            raise StageError(
                f"the daemon has not claimed {job_id}; its last lines:\n{stage.daemon.last_lines()}"
            )
        if job["status"] != "queued":
            waiting_until_s = time.monotonic() + CLAIM_TIMEOUT_S
        pause.wait(POLL_EVERY_S)


def _cancel(admin: Admin, job_id: str) -> None:
    """Cancel and give the daemon the time to end its children; what is then left ends with it."""
    pause = threading.Event()
    ends_s = time.monotonic() + CANCEL_TIMEOUT_S
    with suppress(ClientError):
        admin.cancel(job_id)
        while admin.job(job_id)["finished_at"] is None and time.monotonic() < ends_s:
            pause.wait(POLL_EVERY_S)
