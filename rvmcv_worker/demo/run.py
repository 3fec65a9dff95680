"""The demo: a training all the way, then what its model sees, asked through RVM-Server."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import requests
from minio.error import MinioException
from rich.console import Console

from rvmcv_worker.demo import inferences, material, training
from rvmcv_worker.demo.admin import Admin
from rvmcv_worker.demo.gauge import Gauge
from rvmcv_worker.demo.inferences import Inferences
from rvmcv_worker.demo.material import Material, MaterialError
from rvmcv_worker.demo.questions import Questions
from rvmcv_worker.demo.report import Delivery, JobReport, Summary, print_facts, print_job
from rvmcv_worker.demo.stage import Stage, StageError, set_up
from rvmcv_worker.demo.subject import Subject
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.reference.client import ClientError

POLL_EVERY_S = 0.25
#: How long a daemon may take to wipe a workspace after its last report.
WIPE_TIMEOUT_S = 15.0
#: What the demo leaves in its output folder, beside the folder of the training.
FILES = (
    inferences.DETECTIONS,
    inferences.MASKS,
    inferences.SAM2_MASKS,
    inferences.ANNOTATED,
    "results.png",
    "best.pt",
)

#: What can go wrong beside the jobs themselves, told without a traceback.
EXPECTED_ERRORS = (MaterialError, StageError, ClientError, requests.RequestException, MinioException, OSError)


def run_demo(
    *,
    dataset: Path | None,
    epochs: int | None,
    img_size: int | None,
    sam2: Path | None,
    json_file: Path | None,
    out_dir: Path,
) -> int:
    """Run it and return the exit status: 0 when all jobs completed and nothing was left behind."""
    # A pipe has no width: sums of 64 digits then stay whole.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    demo = Demo(console, out_dir)
    completed = False
    try:
        with _ended_by_signals(), tempfile.TemporaryDirectory(prefix="rvmcv-demo-") as directory:
            completed = demo.perform(Path(directory), dataset, epochs, img_size, sam2)
    except KeyboardInterrupt as stop:
        by = str(stop) or "Ctrl-C"
        _say(
            console,
            f"Stopped by {by}: what ran was ended; both processes and their files are gone.",
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
        self,
        directory: Path,
        dataset: Path | None,
        epochs: int | None,
        img_size: int | None,
        sam2: Path | None,
    ) -> bool:
        """Do all of it; returns whether every job completed, the model is sound and nothing was left."""
        self._out_dir.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (self._out_dir / name).unlink(missing_ok=True)  # of an earlier demo
        segmenter = None if sam2 is None else material.segmenter_name(sam2)
        _say(self._console, "Drawing a data set." if dataset is None else f"Taking the data set {dataset}.")
        data = material.drawn(directory) if dataset is None else material.own(dataset, directory)
        wishes = {"epochs": epochs, "img_size": img_size}
        data = replace(data, training=data.training | {k: v for k, v in wishes.items() if v is not None})
        _say(self._console, "Starting the reference RVM-Server (SQLite, embedded S3) and the daemon.")
        with set_up(directory) as stage:
            admin, gauge = Admin(stage.state), Gauge(stage.daemon.pid)
            job = self._train(stage, admin, gauge, data)
            delivery = training.fetch(admin, job, self._out_dir)
            print_job(self._console, job, delivery)
            if delivery is None:
                self._tell_failure(stage, job)
                faults = [f"the training is {job.status}"]
            else:
                if sam2 is not None and segmenter is not None:
                    admin.add_segmenter(sam2, segmenter)
                faults = self._infer(stage, admin, gauge, data, job, delivery, directory, segmenter)
            self._stop(stage, gauge)
        self._tell_surroundings(gauge)
        for fault in faults:
            _say(self._console, f"not as it should be: {fault}")
        return not faults and not self.summary.workspace_files_left

    def _train(self, stage: Stage, admin: Admin, gauge: Gauge, data: Material) -> JobReport:
        job_id = admin.queue_training(data.archive, data.training)
        fields = data.training
        what = f"{fields['base_model']}, {fields['epochs']} epochs at {fields['img_size']} px"
        _say(self._console, f"Queued {job_id}: {what}, on {data.origin}.")
        report = training.train(stage, admin, gauge, self._console, job_id, data)
        self.summary = replace(self.summary, jobs=(report,), sandbox=admin.sandbox())
        return report

    def _infer(
        self,
        stage: Stage,
        admin: Admin,
        gauge: Gauge,
        data: Material,
        job: JobReport,
        delivery: Delivery,
        directory: Path,
        segmenter: str | None,
    ) -> list[str]:
        """Activate the model and have it asked; returns what is not as it should be."""
        admin.activate(delivery.version)
        _say(self._console, f"\nActivated {delivery.version}: whoever names no model gets it.")
        questions = Questions(stage, admin, gauge)
        second = Inferences(self._console, admin, questions, self._out_dir)
        try:
            second.perform(Subject.prepare(admin, data, job.result or {}, directory), segmenter)
        finally:
            self.summary = replace(self.summary, jobs=(job, *questions.jobs))
        different = (
            [] if delivery.is_equal else ["the row of the model tells another sha256 than its bytes have"]
        )
        return different + second.faults

    def _stop(self, stage: Stage, gauge: Gauge) -> None:
        """Count what jobs have left; if that is nothing, end the daemon and count what its engine has."""
        pause = threading.Event()
        ends_s = time.monotonic() + WIPE_TIMEOUT_S
        while stage.left_by_jobs() and time.monotonic() < ends_s:
            gauge.sample()
            pause.wait(POLL_EVERY_S)
        gauge.sample()
        left = stage.left_by_jobs()
        if not left:
            stage.daemon.stop()
            left = stage.left_over()
        self.summary = replace(
            self.summary,
            workspace_files_left=left,
            daemon_peak_rss_mb=gauge.peak_rss_mb,
            listening_sockets=gauge.listening_sockets,
        )

    def _tell_failure(self, stage: Stage, job: JobReport) -> None:
        error = job.error or {}
        _say(self._console, f"\nThe job is {job.status}. {error.get('code', '')}: {error.get('message', '')}")
        _say(self._console, f"\nThe daemon's last lines:\n{stage.daemon.last_lines()}")

    def _tell_surroundings(self, gauge: Gauge) -> None:
        names = (*FILES, training.ARTIFACTS_DIR)
        ended = Counter(f"{job.status} {job.job_type}" for job in self.summary.jobs)
        facts = {
            "jobs": ", ".join(f"{count} {what}" for what, count in ended.items()),
            "daemon": f"peak {self.summary.daemon_peak_rss_mb} MB resident, {gauge.cpu_s} s of CPU, "
            f"{self.summary.listening_sockets} listening sockets",
            "wall": str(self.summary.sandbox),
            "left by jobs and engine": f"{self.summary.workspace_files_left} files",
            "in " + str(self._out_dir): ", ".join(n for n in names if (self._out_dir / n).exists()),
        }
        print_facts(self._console, facts)


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
