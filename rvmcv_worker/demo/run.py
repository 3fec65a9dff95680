"""The demo: one training all the way, from a data set to a model in RVM-Server's table."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests
from minio.error import MinioException
from rich.console import Console

from rvmcv_worker.demo import gallery, material
from rvmcv_worker.demo.admin import Admin
from rvmcv_worker.demo.gauge import Gauge
from rvmcv_worker.demo.material import Material, MaterialError
from rvmcv_worker.demo.predict import PredictError, predict
from rvmcv_worker.demo.report import Delivery, JobReport, Summary, print_facts, print_job
from rvmcv_worker.demo.sheet import Row, draw_sheet
from rvmcv_worker.demo.stage import Stage, StageError, set_up
from rvmcv_worker.demo.watch import Watch
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.reference.client import ClientError

POLL_EVERY_S = 0.25
#: An idle daemon claims at once; one that has not after this long says why in its log.
CLAIM_TIMEOUT_S = 60.0
#: How long a daemon may take to wipe a workspace after its last report.
WIPE_TIMEOUT_S = 15.0
CANCEL_TIMEOUT_S = 15.0
SHEET_PICTURES = 12
SHEET_CONFIDENCE = 0.4
#: Below the output folder: what the training left beside its model.
ARTIFACTS_DIR = "training"

#: What can go wrong beside the job itself, told without a traceback.
EXPECTED_ERRORS = (MaterialError, StageError, ClientError, requests.RequestException, MinioException, OSError)


def run_demo(
    *, dataset: Path | None, epochs: int | None, img_size: int | None, json_file: Path | None, out_dir: Path
) -> int:
    """Run it and return the exit status: 0 when the job completed and nothing was left behind."""
    # A pipe has no width: sums of 64 digits then stay whole.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    demo = Demo(console, out_dir)
    completed = False
    try:
        with _ended_by_signals(), tempfile.TemporaryDirectory(prefix="rvmcv-demo-") as directory:
            completed = demo.perform(Path(directory), dataset, epochs, img_size)
    except KeyboardInterrupt as stop:
        by = str(stop) or "Ctrl-C"
        _say(
            console,
            f"Stopped by {by}: a job that ran was cancelled; both processes and their files are gone.",
        )
    except EXPECTED_ERRORS as error:
        _say(console, f"The demo failed: {error}")
    if json_file is not None:
        demo.summary.write(json_file)
        _say(console, f"summary in {json_file}")
    return ExitCode.OK if completed else ExitCode.FAILED


class Demo:
    """One performance; `summary` holds what is known of it at any time."""

    def __init__(self, console: Console, out_dir: Path) -> None:
        self.summary = Summary()
        self._console = console
        self._out_dir = out_dir

    def perform(
        self, directory: Path, dataset: Path | None, epochs: int | None, img_size: int | None
    ) -> bool:
        """Do all of it; returns whether the job completed, its model is sound and nothing was left."""
        self._out_dir.mkdir(parents=True, exist_ok=True)
        _say(self._console, "Drawing a data set." if dataset is None else f"Taking the data set {dataset}.")
        data = material.drawn(directory) if dataset is None else material.own(dataset, directory)
        wishes = {"epochs": epochs, "img_size": img_size}
        data = replace(data, training=data.training | {k: v for k, v in wishes.items() if v is not None})
        _say(self._console, "Starting the reference RVM-Server (SQLite, embedded S3) and the daemon.")
        with set_up(directory) as stage:
            admin, gauge = Admin(stage.state), Gauge(stage.daemon.pid)
            job = self._run_job(stage, admin, gauge, data)
            _wait_until_wiped(stage, gauge)
            delivery = self._fetch(admin, job)
            self._summarise(stage, gauge)
            print_job(self._console, job, delivery)
            if delivery is None:
                self._tell_failure(stage, job)
        if delivery is not None:
            self._draw_sheet(directory, data, job)
        self._tell_surroundings(gauge)
        return delivery is not None and delivery.is_equal and not self.summary.workspace_files_left

    def _run_job(self, stage: Stage, admin: Admin, gauge: Gauge, data: Material) -> JobReport:
        started_s = time.monotonic()
        job_id = admin.queue_training(data.archive, data.training)
        fields = data.training
        what = f"{fields['base_model']}, {fields['epochs']} epochs at {fields['img_size']} px"
        _say(self._console, f"Queued {job_id}: {what}, on {data.origin}.")
        try:
            with Watch(self._console, data.training["epochs"]) as watch:
                job = _follow(stage, admin, gauge, watch, job_id)
        except KeyboardInterrupt:
            _cancel(admin, job_id)
            raise
        report = JobReport(
            job_id=job_id,
            job_type=job["job_type"],
            status=job["status"],
            attempt=job["attempt"],
            seconds=round(time.monotonic() - started_s, 2),
            result=job["result"],
            error=job["error"],
        )
        self.summary = replace(self.summary, jobs=(report,), sandbox=admin.sandbox())
        return report

    def _fetch(self, admin: Admin, job: JobReport) -> Delivery | None:
        """Bring what the job stored into the output folder; None without a model."""
        for name in ("best.pt", "results.png", "detections.png"):
            (self._out_dir / name).unlink(missing_ok=True)  # of an earlier demo
        result = job.result or {}
        artifacts = self._out_dir / ARTIFACTS_DIR
        artifacts.mkdir(exist_ok=True)
        for name, path in result.get("artifacts", {}).items():
            admin.fetch(path, (self._out_dir if name == "results.png" else artifacts) / name)
        if job.status != "completed":
            return None
        row = admin.model_row(result["version"])
        stored_sha256 = admin.download_model(result["version"], self._out_dir / "best.pt")
        return Delivery(result["version"], row["sha256_hash"] if row else None, stored_sha256)

    def _summarise(self, stage: Stage, gauge: Gauge) -> None:
        gauge.sample()
        self.summary = replace(
            self.summary,
            workspace_files_left=stage.left_over(),
            daemon_peak_rss_mb=gauge.peak_rss_mb,
            listening_sockets=gauge.listening_sockets,
        )

    def _tell_failure(self, stage: Stage, job: JobReport) -> None:
        error = job.error or {}
        _say(self._console, f"\nThe job is {job.status}. {error.get('code', '')}: {error.get('message', '')}")
        _say(self._console, f"\nThe daemon's last lines:\n{stage.daemon.last_lines()}")

    def _draw_sheet(self, directory: Path, data: Material, job: JobReport) -> None:
        """Draw the sheet; a demo does not fail for want of it."""
        result = job.result or {}
        names = result["data"]["names"]
        try:
            shown = gallery.choose(data.archive, directory / "gallery", names, SHEET_PICTURES)
            found = predict(
                self._out_dir / "best.pt",
                [picture.file for picture in shown.pictures],
                label_task=data.label_task,
                img_size=data.training["img_size"],
                confidence=SHEET_CONFIDENCE,
            )
            pairs = zip(shown.pictures, found, strict=True)
            rows = [Row(picture.file, detections, picture.truths) for picture, detections in pairs]
            split = f"pictures of {shown.split}" + (" (trained on)" if shown.split == "train" else "")
            measured = result["metrics"].get("test") or result["metrics"]
            draw_sheet(
                rows,
                self._out_dir / "detections.png",
                names=names,
                title="What the model finds",
                subtitle=f"{split}, confidence of at least {SHEET_CONFIDENCE}; mAP50 {measured['mAP50']:.3f}",
            )
        except (PredictError, OSError, ValueError) as error:
            _say(self._console, f"No sheet of detections: {error}")

    def _tell_surroundings(self, gauge: Gauge) -> None:
        names = ("detections.png", "results.png", "best.pt", ARTIFACTS_DIR)
        facts = {
            "daemon": f"peak {self.summary.daemon_peak_rss_mb} MB resident, {gauge.cpu_s} s of CPU, "
            f"{self.summary.listening_sockets} listening sockets",
            "wall": str(self.summary.sandbox),
            "left in the workspaces": f"{self.summary.workspace_files_left} files",
            "in " + str(self._out_dir): ", ".join(n for n in names if (self._out_dir / n).exists()),
        }
        print_facts(self._console, facts)


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


def _wait_until_wiped(stage: Stage, gauge: Gauge) -> None:
    pause = threading.Event()
    ends_s = time.monotonic() + WIPE_TIMEOUT_S
    while stage.left_over() and time.monotonic() < ends_s:
        gauge.sample()
        pause.wait(POLL_EVERY_S)


def _cancel(admin: Admin, job_id: str) -> None:
    """Cancel and give the daemon the time to end its children; what is then left ends with it."""
    pause = threading.Event()
    ends_s = time.monotonic() + CANCEL_TIMEOUT_S
    with suppress(ClientError):
        admin.cancel(job_id)
        while admin.job(job_id)["finished_at"] is None and time.monotonic() < ends_s:
            pause.wait(POLL_EVERY_S)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the demo as Ctrl-C does, with all its cleaning up."""

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as `nohup` sets it
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
