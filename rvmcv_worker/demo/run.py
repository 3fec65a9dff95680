"""The demo: trainings all the way, then what their models see, asked through RVM-Server."""

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
from typing import Any

import requests
from minio.error import MinioException
from rich.console import Console

from rvmcv_worker.demo import inferences, material, training
from rvmcv_worker.demo.admin import Admin
from rvmcv_worker.demo.gauge import Gauge
from rvmcv_worker.demo.inferences import Inferences, MaskMaker
from rvmcv_worker.demo.material import Material, MaterialError
from rvmcv_worker.demo.questions import Questions
from rvmcv_worker.demo.report import Delivery, JobReport, Summary, print_facts, print_job
from rvmcv_worker.demo.stage import Stage, StageError, set_up
from rvmcv_worker.demo.subject import Subject
from rvmcv_worker.demo.wishes import Wishes
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.reference.client import ClientError
from rvmcv_worker.terminal import say

POLL_EVERY_S = 0.25
#: How long a daemon may take to wipe a workspace after its last report.
WIPE_TIMEOUT_S = 15.0
#: Sheets of masks by a SAM2 of the user's, and by one that is fine-tuned here.
SAM2_SHEET, TUNED_SHEET = "masks_sam2.png", "masks_fine_tuned.png"
#: Below the output folder: what is of the fine-tuned SAM2.
TUNED_DIR = "sam2"
#: What the demo leaves in its output folder, beside a folder of each training.
FILES = (
    inferences.DETECTIONS,
    inferences.OWN_MASKS.file,
    SAM2_SHEET,
    TUNED_SHEET,
    inferences.ANNOTATED,
    "results.png",
    "best.pt",
    *(f"{TUNED_DIR}/{name}" for name in ("masks.jpg", "curves.png", "best.pt")),
)

#: What can go wrong beside the jobs themselves, told without a traceback.
EXPECTED_ERRORS = (MaterialError, StageError, ClientError, requests.RequestException, MinioException, OSError)


def run_demo(wishes: Wishes, *, json_file: Path | None, out_dir: Path) -> int:
    """Run it and return the exit status: 0 when all jobs completed and nothing was left behind."""
    # A pipe has no width: sums of 64 digits then stay whole.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    demo = Demo(console, out_dir)
    completed = False
    try:
        with _ended_by_signals(), tempfile.TemporaryDirectory(prefix="rvmcv-demo-") as directory:
            completed = demo.perform(Path(directory), wishes)
    except KeyboardInterrupt as stop:
        by = str(stop) or "Ctrl-C"
        say(
            console,
            f"Stopped by {by}: what ran was ended; both processes and their files are gone.",
        )
    except EXPECTED_ERRORS as error:
        say(console, f"The demo failed: {error}")
    if json_file is not None:
        demo.summary.write(json_file)
        say(console, f"summary in {json_file}")
    return ExitCode.OK if completed else ExitCode.FAILED


class _TrainingFailedError(Exception):
    """A training brought no model: there is nothing to go on with."""

    def __init__(self, job: JobReport) -> None:
        super().__init__(job.status)
        self.job = job


class Demo:
    """One performance; `summary` holds what is known of it at any time."""

    def __init__(self, console: Console, out_dir: Path) -> None:
        self.summary = Summary()
        #: What is not as it should be, a sentence each.
        self._faults: list[str] = []
        self._console = console
        self._out_dir = out_dir

    def perform(self, directory: Path, wishes: Wishes) -> bool:
        """Do all of it; returns whether every job completed, the models are sound and nothing was left."""
        self._out_dir.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (self._out_dir / name).unlink(missing_ok=True)  # of an earlier demo
        drawing = (
            "Drawing a data set." if wishes.dataset is None else f"Taking the data set {wishes.dataset}."
        )
        say(self._console, drawing)
        data = material.prepare(wishes, directory)
        say(self._console, "Starting the reference RVM-Server (SQLite, embedded S3) and the daemon.")
        with set_up(directory) as stage:
            admin, gauge = Admin(stage.state), Gauge(stage.daemon.pid)
            try:
                self._act(stage, admin, gauge, wishes, data, directory)
            except _TrainingFailedError as failed:
                self._tell_failure(stage, failed.job)
            self._stop(stage, gauge)
        self._tell_surroundings(gauge)
        for fault in self._faults:
            say(self._console, f"not as it should be: {fault}")
        return not self._faults and not self.summary.workspace_files_left

    def _act(
        self, stage: Stage, admin: Admin, gauge: Gauge, wishes: Wishes, data: Material, directory: Path
    ) -> None:
        """Train the detector, fine-tune SAM2 where that is wished for, and ask both."""
        job, detector = self._train(stage, admin, gauge, data.training, data, self._out_dir)
        makers = []
        if wishes.sam2 is not None:
            version = material.segmenter_name(wishes.sam2)
            admin.add_segmenter(wishes.sam2, version)
            makers.append(MaskMaker(version, version, SAM2_SHEET))
        if data.segmenting is not None:
            say(self._console, "")
            folder = self._out_dir / TUNED_DIR
            _, tuned = self._train(stage, admin, gauge, data.segmenting, data, folder)
            makers.append(MaskMaker(tuned.version, "the fine-tuned SAM2", TUNED_SHEET))
        admin.activate(detector.version)
        say(self._console, f"\nActivated {detector.version}: whoever names no model gets it.")
        trained, questions = self.summary.jobs, Questions(stage, admin, gauge)
        asking = Inferences(self._console, admin, questions, self._out_dir)
        try:
            asking.perform(Subject.prepare(admin, data, job.result or {}, directory), makers)
        finally:
            self.summary = replace(self.summary, jobs=(*trained, *questions.jobs))
            self._faults += asking.faults

    def _train(
        self,
        stage: Stage,
        admin: Admin,
        gauge: Gauge,
        fields: dict[str, Any],
        data: Material,
        out_dir: Path,
    ) -> tuple[JobReport, Delivery]:
        """Queue one training, show it, and bring what it delivers into `out_dir`."""
        job_id = admin.queue_training(data.archive, fields)
        what = f"{fields['base_model']}, {fields['epochs']} epochs at {fields['img_size']} px"
        say(self._console, f"Queued {job_id}: {what}, on {data.origin}.")
        job = training.train(stage, admin, gauge, self._console, job_id, fields["epochs"])
        self.summary = replace(self.summary, jobs=(*self.summary.jobs, job), sandbox=admin.sandbox())
        delivery = training.fetch(admin, job, out_dir)
        print_job(self._console, job, delivery)
        if delivery is None:
            self._faults.append(f"the training is {job.status}")
            raise _TrainingFailedError(job)
        if not delivery.is_equal:
            self._faults.append(
                f"the row of the model {delivery.version} tells another sha256 than its bytes have"
            )
        return job, delivery

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
        say(self._console, f"\nThe job is {job.status}. {error.get('code', '')}: {error.get('message', '')}")
        say(self._console, f"\nThe daemon's last lines:\n{stage.daemon.last_lines()}")

    def _tell_surroundings(self, gauge: Gauge) -> None:
        names = (*FILES, training.ARTIFACTS_DIR, f"{TUNED_DIR}/{training.ARTIFACTS_DIR}")
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
