"""Worker status: tells RVM-Server how the worker is, renews leases, learns of cancels and wishes."""

from __future__ import annotations

import threading
import time

import psutil
from loguru import logger

from rvmcv_worker import __version__
from rvmcv_worker.attempt import Services
from rvmcv_worker.controller import ControllerError, ProtocolMissingError, TokenRejectedError
from rvmcv_worker.events import Event, event
from rvmcv_worker.gpu import Gpus
from rvmcv_worker.interrupt import StopReason
from rvmcv_worker.nvml import GpuReading
from rvmcv_worker.operator_wish import WISHES
from rvmcv_worker.protocol import (
    GpuStatus,
    HostStatus,
    LaneClaims,
    LeaseRef,
    LeaseState,
    WorkerStatus,
    WorkerStatusAnswer,
)
from rvmcv_worker.state import Lane, RunningJob

#: Seconds between two reports until RVM-Server sets its own.
_IDLE_S, _BUSY_S = 10.0, 3.0
#: No server makes a worker report more often than this, in seconds.
_LEAST_S = 0.01
_SUPERSEDED = (
    "another daemon of this worker's id has spoken to RVM-Server since, which offers this one nothing any"
    " more: end the other, or give it an id of its own, then restart this one"
)
#: Least seconds between two reports that a change of state asks for.
_GAP_S = 0.2
#: The source of what `Condition` says while no worker status is delivered.
_FAULT = "server-status"
_MB, _GB = 1024 * 1024, 1e9


class Heartbeat(threading.Thread):
    """One thread for the daemon's life."""

    def __init__(self, services: Services, lanes: frozenset[Lane]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._services = services
        self._lanes = lanes
        self._start_s = time.monotonic()
        self._idle_s, self._busy_s = _IDLE_S, _BUSY_S
        self._missing_said = False
        self._reports = 0
        self._closing = threading.Event()
        psutil.cpu_percent()  # the first reading has nothing to compare with

    def run(self) -> None:
        """Report at the interval, and at once when something changed."""
        condition, scaled = self._services.condition, self._services.settings.scaled
        condition.settled.wait()
        if condition.stopping.is_set():
            return  # what the daemon before left is not settled: nothing is to be said yet
        while not self._closing.is_set():
            condition.changed.clear()
            try:
                self.beat()
            except Exception:  # noqa: BLE001 - without worker status every lease would run out
                event(Event.WORKER_FAULT).exception(
                    "a fault of the worker's own in the worker status: it goes on; please report it "
                    "with these lines"
                )
            condition.introduced.set()
            interval_s = self._busy_s if condition.running() else self._idle_s
            if condition.changed.wait(max(_LEAST_S, scaled(interval_s))):
                self._closing.wait(scaled(_GAP_S))

    def close(self) -> None:
        """Send nothing more; does not wait for a report on its way."""
        self._closing.set()
        self._services.condition.changed.set()

    def beat(self) -> None:
        """Send one report and do what the answer says."""
        condition = self._services.condition
        running = {job.job_id: job for job in condition.running()}
        try:
            answer = self._services.controller.worker_status(self._status())
        except ProtocolMissingError as error:
            if not self._missing_said:
                event(Event.SERVER_TOO_OLD).warning(
                    "{}; leases are kept by progress reports, nothing to do but to update RVM-Server", error
                )
                self._missing_said = True
            return
        except TokenRejectedError as error:
            if condition.degrade("token", str(error)):
                event(Event.TOKEN_REJECTED).error(
                    "{}, then systemctl reload rvmcv-worker; claims stop, running jobs go on",
                    error,
                )
            self._services.retry.before_retry(error)
            return
        except ControllerError as error:
            logger.debug("worker status not delivered: {}", error)
            # The reason holds no detail: each new one would be told at once.
            if condition.degrade(_FAULT, "RVM-Server does not take the worker status", frozenset()):
                event(Event.SERVER_UNREACHABLE).warning(
                    "worker status not delivered: {}; running jobs go on, it is tried again; nothing "
                    "to do unless it stays so",
                    error,
                )
            return
        recovered = [condition.recover(source) for source in ("token", _FAULT)]
        if any(recovered):
            event(Event.SERVER_REACHABLE).info("RVM-Server takes the worker status again")
        if answer.superseded:
            if condition.degrade("superseded", _SUPERSEDED):
                event(Event.WORKER_SUPERSEDED).error(_SUPERSEDED)
        else:
            condition.recover("superseded")
        self._follow(answer, running)

    def _follow(self, answer: WorkerStatusAnswer, running: dict[str, RunningJob]) -> None:
        """Do what RVM-Server says; `running` are the jobs of which it was told."""
        for job_id, lease in answer.leases.items():
            if (job := running.get(job_id)) is None:
                continue
            if lease is LeaseState.CANCEL:
                job.interrupt.request(StopReason.CANCELLED)
            elif lease is LeaseState.LOST:
                job.interrupt.request(StopReason.FENCED, "RVM-Server says that the lease is lost")
        if self._services.condition.want(answer.desired_state):
            event(WISHES[answer.desired_state]).info("RVM-Server's wish: {}", answer.desired_state.value)
        self._idle_s, self._busy_s = answer.interval_s.idle, answer.interval_s.busy

    def uptime_s(self) -> int:
        """How long the daemon has been up, in seconds."""
        return int(time.monotonic() - self._start_s)

    def claims(self) -> LaneClaims:
        """Which lanes claim at this moment; one without a job type never does."""
        condition = self._services.condition
        return LaneClaims(**{lane.value: lane in self._lanes and condition.claims(lane) for lane in Lane})

    def _status(self) -> WorkerStatus:
        services = self._services
        condition = services.condition
        memory, free_bytes = psutil.virtual_memory(), services.disk_room.last.free_bytes
        return WorkerStatus(
            worker_id=services.settings.worker.id,
            instance_id=services.instance_id,
            version=__version__,
            state=condition.state(),
            reasons=condition.reasons(),
            claims=self.claims(),
            uptime_s=self.uptime_s(),
            sandbox=services.sandbox.name,
            gpus=gpu_statuses(services.gpus),
            host=HostStatus(
                cpu_pct=psutil.cpu_percent(),
                memory_used_mb=(memory.total - memory.available) // _MB,
                memory_total_mb=memory.total // _MB,
                # As seen last: where the disk hangs the leases are renewed all the same.
                disk_free_gb=None if free_bytes is None else round(free_bytes / _GB, 1),
                workspace_gb=round(services.work_usage.last.bytes / _GB, 3),
            ),
            jobs=condition.totals(outbox=self._outbox()),
            engines=services.engines.status(),
            leases=[LeaseRef(job_id=job.job_id, lease_token=job.lease_token) for job in condition.running()],
        )

    def _outbox(self) -> int:
        """Return how many final reports wait, as seen last where the ledger hangs: no lease waits for it."""
        if backlog := self._services.ledger.backlog():
            self._reports = backlog.reports
        return self._reports


def gpu_statuses(gpus: Gpus) -> list[GpuStatus]:
    """Return every GPU as last read, which asks nobody."""
    return [_gpu(gpus, index, reading) for index, reading in gpus.readings().items()]


def _gpu(gpus: Gpus, index: int, reading: GpuReading | None) -> GpuStatus:
    """Return a GPU as last read; of one that does not answer only what it is."""
    identity = gpus.identity(index)
    total_bytes = identity.memory_total_bytes
    if reading is None:
        return GpuStatus(index=index, name=identity.name, memory_total_mb=total_bytes // _MB)
    return GpuStatus(
        index=index,
        name=identity.name,
        utilization_pct=reading.utilization_pct,
        memory_used_mb=(total_bytes - reading.memory_free_bytes) // _MB,
        memory_total_mb=total_bytes // _MB,
        temperature_c=reading.temperature_c,
        power_w=reading.power_w,
    )
