"""The way of one job, from the accepted claim to the wiped workspace."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from rvmcv_worker import attempt_log, checkpoints, final_report, http_session
from rvmcv_worker import workspace as workspaces
from rvmcv_worker.checkpoints import Checkpoints
from rvmcv_worker.config import Settings
from rvmcv_worker.controller import Controller
from rvmcv_worker.disk_room import DiskRoom
from rvmcv_worker.engine_client import Engines
from rvmcv_worker.errors import (
    FencedError,
    InternalError,
    JobCancelledError,
    JobError,
    WorkerUnfitError,
)
from rvmcv_worker.events import Event, event
from rvmcv_worker.executor import ChildEnd, ChildSpec, run_child
from rvmcv_worker.gpu import Gpus
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.job_logs import JobLogs
from rvmcv_worker.job_type import JobType
from rvmcv_worker.ledger import ClaimState, Ledger
from rvmcv_worker.model_store import ModelStore
from rvmcv_worker.outbox import Outbox
from rvmcv_worker.progress import ProgressReporter
from rvmcv_worker.progress_log import ProgressLog
from rvmcv_worker.protocol import (
    MAX_RESULT_BYTES,
    Checkpoint,
    Claim,
    FinishReport,
    JobOffer,
    encode,
    to_wire,
)
from rvmcv_worker.retry import Retry
from rvmcv_worker.sandbox import Sandbox
from rvmcv_worker.spawner import Spawner
from rvmcv_worker.state import Condition, Lane, RunningJob
from rvmcv_worker.storage import PATIENCE_S, Storage
from rvmcv_worker.tally import Tally
from rvmcv_worker.tick import Tick
from rvmcv_worker.token_source import TokenSource
from rvmcv_worker.uploads import Stored
from rvmcv_worker.workspace import LeftBehindError, UsageMeter, Workspace


@dataclass(frozen=True)
class Services:
    """What the daemon has one of, and jobs use."""

    settings: Settings
    instance_id: str
    token: TokenSource
    condition: Condition
    ledger: Ledger
    controller: Controller
    retry: Retry
    storage: Storage
    model_store: ModelStore
    sandbox: Sandbox
    spawner: Spawner
    outbox: Outbox
    gpus: Gpus
    work_usage: UsageMeter
    engines: Engines
    tally: Tally
    tick: Tick = field(default_factory=Tick)
    job_logs: JobLogs = field(default_factory=JobLogs)
    disk_room: DiskRoom = field(default_factory=DiskRoom)


@dataclass(frozen=True)
class Attempt:
    """One accepted claim under way, as a job type sees it."""

    services: Services
    offer: JobOffer
    claim: Claim
    workspace: Workspace
    progress: ProgressReporter
    interrupt: Interrupt
    checkpoints: Checkpoints
    #: Indexes of the GPUs that are this attempt's; empty on a CPU.
    gpus: tuple[int, ...]
    #: Seconds by phase, for the final report.
    timings: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell RVM-Server what is done now, and note how long it took."""
        self.interrupt.check()
        self.progress.update(phase=name, message=None, images_done=None, images_total=None)
        start_s = time.monotonic()
        try:
            yield
        finally:
            took_s = time.monotonic() - start_s
            self.timings[name] = round(self.timings.get(name, 0.0) + took_s, 3)
            self.services.tally.phase_took(self.offer.job_type, name, took_s)

    def enter(self, state: ClaimState) -> None:
        """Note in the ledger how far the attempt is."""
        self.services.ledger.enter(self.offer.job_id, state)

    def run_child(
        self,
        name: str,
        job: dict[str, Any],
        *,
        readable: tuple[str, ...] = (),
        timeout_s: float,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> ChildEnd:
        """Run one child behind the wall to its end; its progress is the job's, or `on_progress` takes it."""
        services = self.services
        gpus = tuple(services.gpus.identity(index).device_number for index in self.gpus)
        return run_child(
            ChildSpec(
                name=name,
                job=job,
                readable=readable,
                timeout_s=timeout_s,
                gpus=gpus,
                gpu_memory_fraction=services.gpus.memory_fraction(self.gpus),
                check_gpus=lambda again: services.gpus.check(self.gpus, again=again),
            ),
            workspace=self.workspace,
            sandbox=services.sandbox,
            spawner=services.spawner,
            limits=services.settings.limits,
            interrupt=self.interrupt,
            on_progress=on_progress or self._hear,
            log=partial(services.job_logs.print, self.offer.job_id),
        )

    def _hear(self, said: dict[str, Any]) -> None:
        if "checkpoint" in said:
            self.checkpoints.announce()
        self.progress.take(said)

    def fetch_checkpoint(self, max_bytes: int | None = None) -> str | None:
        """Bring what an earlier attempt left, to go on from; None to start from the beginning.

        It is at most as large as that of a training, or `max_bytes`.
        """
        return checkpoints.fetch(
            self.services.storage,
            self.claim.resume,
            self.workspace,
            max_bytes=max_bytes or checkpoints.max_bytes(self.services.settings),
            interrupt=self.interrupt,
        )

    def store(
        self,
        path: Path,
        name: str,
        sha256: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        interrupt: Interrupt | None = None,
    ) -> Stored:
        """Put a file, whose `sha256` may be known, into storage under the attempt's own key.

        Storage that is away is waited for so long; `interrupt`, in the place of the attempt's, ends that.
        Raises `JobError`.
        """
        return self.services.storage.put_artifact(
            path,
            name,
            job_id=self.offer.job_id,
            attempt=self.claim.attempt,
            lease_token=self.claim.lease_token,
            interrupt=interrupt or self.interrupt,
            patience_s=patience_s,
            sha256=sha256,
        )


def begin_attempt(services: Services, job_type: JobType, offer: JobOffer, claim: Claim) -> RunningJob:
    """Note an accepted claim as running: from here on its lease is renewed, and a stop waits for its end."""
    job = RunningJob(
        offer.job_id, job_type.name, job_type.lane, claim.attempt, claim.lease_token, Interrupt()
    )
    services.job_logs.open(offer.job_id, job_type.lane)
    attempt_log.tell_claimed(job)
    services.condition.started(job)
    return job


def run_attempt(
    services: Services,
    job: RunningJob,
    job_type: JobType,
    offer: JobOffer,
    claim: Claim,
    gpus: tuple[int, ...],
) -> str:
    """Run one attempt: fetch, run, publish, report, wipe. Nothing it can meet is raised.

    Returns the status of its final report, ``fenced`` when there is none.
    """
    interrupt = job.interrupt
    status, error_code = "fenced", None
    try:
        with (
            # For what is told by who knows of no job.
            logger.contextualize(job_id=offer.job_id, lane=job.lane.value),
            workspaces.make(services.settings.work_dir, offer.job_id, claim.attempt) as workspace,
            _reporter(services, job, claim) as progress,
            _checkpoints(services, job, workspace, progress) as kept,
        ):
            attempt = Attempt(services, offer, claim, workspace, progress, interrupt, kept, gpus)
            report = _run(attempt, job_type)
            status, error_code = report["status"], report.get("error", {}).get("code")
            if job.lane is Lane.INFER and status == "completed":
                services.outbox.expect(offer.job_id)
            _enter_outbox(services, report, job_type.courtesy(offer, report), workspace)
    except LeftBehindError:
        status = "queued"
        services.ledger.enter(offer.job_id, ClaimState.STOPPED)
        event(Event.JOB_LEFT_BEHIND, offer.job_id).warning(
            "storage does not take the checkpoint: the next start hands the job back with it; "
            "nothing to do unless it stays so"
        )
    except FencedError as error:
        services.ledger.forget(offer.job_id)
        event(Event.JOB_FENCED, offer.job_id).warning(
            "lease lost ({}): result discarded, the job is another's or over; nothing to do", error.reason
        )
    except Exception:  # noqa: BLE001 - the settlement does what is left to do
        event(Event.JOB_LEFT_BEHIND, offer.job_id).exception(
            "the attempt could not be brought to an end, the job is handed back in half a "
            "minute; please report this fault with these lines"
        )
    finally:
        interrupt.close()
        services.job_logs.close(offer.job_id)
        services.condition.ended(job, status, error_code)
        services.outbox.wake()
    return status


def _reporter(services: Services, job: RunningJob, claim: Claim) -> ProgressReporter:
    scaled = services.settings.scaled
    return ProgressReporter(
        services.controller,
        services.retry,
        job_id=job.job_id,
        lease_token=job.lease_token,
        interval_s=scaled(claim.report_interval_s),
        keep_alive_s=scaled(min(10.0, claim.lease_s / 3)),
        interrupt=job.interrupt,
        state=job.progress,
        # What is over in milliseconds is told by its end alone.
        first_s=scaled(claim.report_interval_s) if job.lane is Lane.INFER else 0.0,
        log=None if job.lane is Lane.INFER else ProgressLog(job.job_id),
    )


def _checkpoints(
    services: Services, job: RunningJob, workspace: Workspace, progress: ProgressReporter
) -> Checkpoints:
    settings = services.settings
    return Checkpoints(
        workspace,
        checkpoint_put(services, workspace, job.lease_token),
        max_bytes=checkpoints.max_bytes(settings),
        every_s=settings.scaled(settings.worker.checkpoint_every_min * 60),
        progress=progress,
        interrupt=job.interrupt,
    )


def checkpoint_put(services: Services, workspace: Workspace, lease_token: str) -> checkpoints.Put:
    """Return what puts a checkpoint into storage under the attempt's own key."""

    def put(path: Path, name: str, interrupt: Interrupt) -> Stored:
        return services.storage.put_artifact(
            path,
            name,
            job_id=workspace.job_id,
            attempt=workspace.attempt,
            lease_token=lease_token,
            interrupt=interrupt,
            patience_s=0.0,  # a newer one comes
        )

    return put


def _run(attempt: Attempt, job_type: JobType) -> dict[str, Any]:
    """Run the job and return its final report; raises `FencedError` and `LeftBehindError` only."""
    start_s = time.monotonic()
    report = final_report.begin(attempt.offer.job_id, attempt.claim.lease_token)
    try:
        config = job_type.parse(attempt.offer.config)
        with http_session.ended_by(attempt.interrupt):
            result = _within_limit(attempt, job_type.run(attempt, config))
    except JobCancelledError as error:
        event(Event.JOB_CANCELLED, attempt.offer.job_id).info("{}: nothing is published", error)
        report |= final_report.cancellation(error)
    except JobError as error:
        report |= final_report.failure(error, attempt.services.settings)
        attempt_log.tell_ended(attempt.offer.job_id, error)
    except FencedError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the job ends by it, not the worker
        if _is_for_want_of_room(error):
            wrong: JobError = WorkerUnfitError(f"the worker's disk is full ({error}): the job goes back")
            attempt_log.tell_ended(attempt.offer.job_id, wrong)
        else:
            wrong = InternalError(f"{type(error).__name__}: {error}")
            attempt_log.tell_ended(attempt.offer.job_id, wrong, fault=error)
        report |= final_report.failure(wrong, attempt.services.settings)
    else:
        report |= {"status": "completed", "result": result}
        attempt_log.tell_completed(attempt.offer.job_id, job_type.lane, time.monotonic() - start_s, result)
    if report["status"] == "queued" and (left_off := _store_last(attempt)):
        report["checkpoint"] = to_wire(left_off)
    if attempt.interrupt.reason is not None:
        with contextlib.suppress(JobCancelledError, JobError):
            attempt.interrupt.check()  # raises when fenced: then nothing is reported at all
    report["timings"] = {**attempt.timings, "total": round(time.monotonic() - start_s, 3)}
    try:
        return to_wire(FinishReport.model_validate(report))
    except ValueError as error:  # what a child said can be anything
        event(Event.WORKER_FAULT, attempt.offer.job_id).exception(
            "the final report cannot be written as it is, the job is handed back; please "
            "report this fault with these lines"
        )
        wrong = InternalError(f"the final report cannot be written: {type(error).__name__}")
        bare = final_report.begin(attempt.offer.job_id, attempt.claim.lease_token)
        bare |= final_report.failure(wrong, attempt.services.settings)
        return to_wire(FinishReport.model_validate({**bare, "timings": report["timings"]}))


def _store_last(attempt: Attempt) -> Checkpoint | None:
    """Store where a job that is handed back left off; raises `LeftBehindError` if only the next start can."""
    try:
        return attempt.checkpoints.store_last()
    except checkpoints.StorageAwayError as error:
        if attempt.services.condition.stopping.is_set():
            raise LeftBehindError from None
        event(Event.JOB_CHECKPOINT_LOST, attempt.offer.job_id).warning(
            "{}: the next attempt goes on from an earlier one, or anew; nothing to do", error
        )
        return None


def _is_for_want_of_room(error: Exception) -> bool:
    """Whether the daemon itself, not a child, met a full disk."""
    if isinstance(error, sqlite3.OperationalError):
        return "disk is full" in str(error)
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


def _within_limit(attempt: Attempt, result: dict[str, Any]) -> dict[str, Any]:
    """Return a result that a final report can hold: a larger one goes to storage, and its path stays."""
    text = encode(result)
    if len(text) <= MAX_RESULT_BYTES:
        return result
    brief = final_report.brief(result)
    if not attempt.services.storage.can_store:
        return brief
    whole = attempt.workspace.out_dir / "result.json"
    whole.write_bytes(text)
    stored = attempt.store(whole, "result.json")
    return {**brief, "result_path": stored.path, "sha256": stored.sha256}


def _enter_outbox(
    services: Services, report: dict[str, Any], courtesy: dict[str, Any] | None, workspace: Workspace
) -> None:
    """Put a final report into the ledger, however long the disk is full or the file locked.

    The workspace, which nobody needs any more, goes first on a full disk: it may be what fills it.
    """
    for delay_s in services.retry.delays():
        try:
            services.ledger.finish(report["job_id"], report, courtesy)
        except sqlite3.OperationalError as error:
            event(Event.REPORT_WAITS, report["job_id"]).warning(
                "the final report cannot be written, tried again in {:.0f} s: {}; make room on "
                "the disk of [worker] state_dir",
                delay_s,
                error,
            )
            if _is_for_want_of_room(error):
                with contextlib.suppress(OSError):  # it is wiped again at the end
                    workspaces.wipe(workspace.root)
            if services.condition.stopping.wait(delay_s):
                # There is no later: it is delivered now, or the next start hands the job back.
                services.controller.finish(report)
                services.ledger.forget(report["job_id"])
                return
        else:
            return
