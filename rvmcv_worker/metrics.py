"""`GET /metrics`: how the worker is at this moment, and what it has counted, as Prometheus reads it.

What is read at each look is what other threads have noted, so that a GPU library or a disk that hangs delays
none: looks that hang would take all places of the socket. A figure that cannot be had is left out: an old one
would lie. docs/metrics.md lists them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from rvmcv_worker import __version__, readiness
from rvmcv_worker.attempt import Services
from rvmcv_worker.disk_room import SILENT_S
from rvmcv_worker.engine_wire import Trust
from rvmcv_worker.heartbeat import Heartbeat
from rvmcv_worker.nvml import GpuIdentity, GpuReading
from rvmcv_worker.protocol import DesiredState, EngineStatus, WorkerState
from rvmcv_worker.routes import Answer

if TYPE_CHECKING:
    from rvmcv_worker.lanes import LaneLoop

_ENGINE_STATES = ("stopped", "starting", "idle", "busy")
_MB, _GB = 1024**2, 1e9

#: A family each, what it says, and how its figure is read; None where it is not known.
_ENGINE_FIGURES: tuple[tuple[str, str, Callable[[EngineStatus], float]], ...] = (
    (
        "rvmcv_engine_in_flight",
        "Images that the engine is asked about now.",
        lambda engine: engine.in_flight,
    ),
    ("rvmcv_engine_answers_total", "Images that the engine has answered.", lambda engine: engine.answered),
    (
        "rvmcv_engine_replacements_total",
        "How often the engine failed and a fresh one took its place.",
        lambda engine: engine.replaced,
    ),
    ("rvmcv_engine_memory_bytes", "Memory of the engine's processes.", lambda engine: engine.memory_mb * _MB),
)
_GPU_FIGURES: tuple[tuple[str, str, Callable[[GpuIdentity, GpuReading], float | None]], ...] = (
    (
        "rvmcv_gpu_memory_used_bytes",
        "Memory of the GPU in use, by anybody.",
        lambda gpu, its: gpu.memory_total_bytes - its.memory_free_bytes,
    ),
    (
        "rvmcv_gpu_memory_own_bytes",
        "Memory of the GPU that this worker's processes hold.",
        lambda _, its: its.memory_own_bytes,
    ),
    (
        "rvmcv_gpu_utilization_ratio",
        "How busy the GPU is, 0 to 1.",
        lambda _, its: None if its.utilization_pct is None else its.utilization_pct / 100,
    ),
    ("rvmcv_gpu_temperature_celsius", "Temperature of the GPU.", lambda _, its: its.temperature_c),
    ("rvmcv_gpu_power_watts", "Power that the GPU draws.", lambda _, its: its.power_w),
    (
        "rvmcv_gpu_ecc_errors",
        "Uncorrectable memory errors of the GPU since its last reset.",
        lambda _, its: its.ecc_errors,
    ),
)


class Metrics:
    """All metrics of one daemon, in a registry of their own."""

    def __init__(self, services: Services, heartbeat: Heartbeat, lanes: Sequence[LaneLoop]) -> None:
        self._tally = services.tally
        self._now = CollectorRegistry(auto_describe=False)
        self._now.register(_Moment(services, heartbeat, lanes))
        # The daemon's own memory, time and descriptors; without the prefix they would be node_exporter's.
        ProcessCollector(namespace="rvmcv", registry=self._now)

    def text(self) -> bytes:
        """Return them in Prometheus' text format."""
        return generate_latest(self._now) + generate_latest(self._tally.registry)

    def answer(self) -> Answer:
        """Return the answer to `GET /metrics`."""
        return Answer(self.text(), content_type=CONTENT_TYPE_PLAIN_0_0_4)


class _Moment(Collector):
    """Reads how things are at each look; nobody has to keep gauges up to date."""

    def __init__(self, services: Services, heartbeat: Heartbeat, lanes: Sequence[LaneLoop]) -> None:
        self._services = services
        self._heartbeat = heartbeat
        self._lanes = lanes

    def collect(self) -> Iterable[Metric]:
        """Yield every family of this moment."""
        yield from self._worker()
        yield from self._lanes_and_jobs()
        yield from self._engines()
        yield from self._gpus()
        yield from self._backlog()
        yield from self._disk()

    def _worker(self) -> Iterator[Metric]:
        services = self._services
        condition = services.condition
        about = {
            "version": __version__,
            "worker_id": services.settings.worker.id,
            "wall": services.sandbox.name,
            "driver": services.gpus.driver,
        }
        yield InfoMetricFamily(
            "rvmcv_worker",
            "1; its labels say which worker this is, behind which wall and with which NVIDIA driver.",
            value=about,
        )
        now = condition.state()
        yield _by(
            "rvmcv_worker_state",
            "1 for the state that the worker is in.",
            "state",
            {state.value: state is now for state in WorkerState},
        )
        yield _gauge(
            "rvmcv_worker_ready",
            "1 while some lane claims jobs, as /readyz says.",
            readiness.is_ready(self._heartbeat.claims()),
        )
        yield _gauge(
            "rvmcv_worker_tick_age_seconds",
            "How long ago the main loop ticked; over 10 it hangs, and /healthz says so.",
            services.tick.age_s(),
        )
        yield _by(
            "rvmcv_worker_fault",
            "1 for each fault that there is; /readyz and `rvmcv-worker status` have its sentence.",
            "source",
            dict.fromkeys(condition.fault_sources(), 1),
        )
        wishes = condition.wishes()
        wish = GaugeMetricFamily(
            "rvmcv_worker_wish",
            "1 for what server and operator each wish; the stricter wish holds.",
            labels=["by", "wish"],
        )
        for by, wanted in (("server", wishes.server), ("operator", wishes.operator)):
            for desired in DesiredState:
                wish.add_metric([by, desired.value], desired is wanted)
        yield wish

    def _lanes_and_jobs(self) -> Iterator[Metric]:
        slots = {loop.lane.value: loop.slots for loop in self._lanes}
        yield _by(
            "rvmcv_lane_claims",
            "1 while the lane claims jobs; one without a job type never does.",
            "lane",
            self._heartbeat.claims().model_dump(),
        )
        yield _by(
            "rvmcv_lane_slots",
            "Jobs that may run in the lane at once.",
            "lane",
            {lane: its.count for lane, its in slots.items()},
        )
        yield _by(
            "rvmcv_lane_slots_free",
            "Of the lane's slots those that a job could have now; one of an unfit GPU is not.",
            "lane",
            {lane: its.free() for lane, its in slots.items()},
        )
        yield _gauge(
            "rvmcv_held_polls",
            "Polls that wait for RVM-Server's answer.",
            self._services.controller.held_polls,
        )
        ran_s: dict[str, list[float]] = {name: [] for name in self._services.settings.worker.job_types}
        now_s = time.monotonic()
        for job in self._services.condition.running():
            ran_s[job.job_type].append(now_s - job.started_s)
        yield _by(
            "rvmcv_jobs_running",
            "Attempts under way.",
            "job_type",
            {name: len(each) for name, each in ran_s.items()},
        )
        yield _by(
            "rvmcv_jobs_running_longest_seconds",
            "How long the attempt that began first has been running; 0 without one.",
            "job_type",
            {name: max(each, default=0.0) for name, each in ran_s.items()},
        )

    def _engines(self) -> Iterator[Metric]:
        engines = {trust.value: EngineStatus(trust=trust.value, state="stopped") for trust in Trust}
        engines |= {engine.trust: engine for engine in self._services.engines.status()}
        state = GaugeMetricFamily(
            "rvmcv_engine_state",
            "1 for the state that each inference engine is in.",
            labels=["engine", "state"],
        )
        for name, engine in engines.items():
            for known in _ENGINE_STATES:
                state.add_metric([name, known], known == engine.state)
        yield state
        for family, told, figure in _ENGINE_FIGURES:
            yield _by(family, told, "engine", {name: figure(engine) for name, engine in engines.items()})

    def _gpus(self) -> Iterator[Metric]:
        gpus = self._services.gpus
        readings, faults = gpus.readings(), gpus.faults()
        known = {index: gpus.identity(index) for index in readings}
        about = InfoMetricFamily("rvmcv_gpu", "1; its labels say what the GPU is.", labels=["gpu"])
        for index, gpu in known.items():
            about.add_metric([str(index)], {"uuid": gpu.uuid, "name": gpu.name})
        yield about
        yield _by(
            "rvmcv_gpu_fit",
            "1 while the GPU may get jobs; 0 while it is lost, hot, faulty or silent.",
            "gpu",
            {index: index not in faults for index in readings},
        )
        yield _by(
            "rvmcv_gpu_memory_size_bytes",
            "Memory that the GPU has.",
            "gpu",
            {index: gpu.memory_total_bytes for index, gpu in known.items()},
        )
        for family, told, figure in _GPU_FIGURES:
            figures = {index: figure(known[index], its) for index, its in readings.items() if its}
            yield _by(family, told, "gpu", figures)

    def _backlog(self) -> Iterator[Metric]:
        backlog = self._services.ledger.backlog()
        yield _gauge(
            "rvmcv_ledger_readable",
            "1 while the ledger can be read within half a second.",
            backlog is not None,
        )
        if backlog:
            yield _gauge(
                "rvmcv_ledger_claims", "Attempts in the ledger that have no final report yet.", backlog.claims
            )
            yield _gauge(
                "rvmcv_outbox_reports", "Final reports that RVM-Server has not accepted yet.", backlog.reports
            )
            yield _gauge(
                "rvmcv_outbox_oldest_age_seconds",
                "How long ago the oldest of these final reports was written; 0 without one.",
                backlog.oldest_s,
            )

    def _disk(self) -> Iterator[Metric]:
        services = self._services
        look = services.disk_room.last
        yield _gauge(
            "rvmcv_disk_floor_bytes",
            "[limits] disk_floor_gb: with less free nothing is claimed.",
            services.settings.limits.disk_floor_gb * _GB,
        )
        for family, told, size_bytes in (
            ("rvmcv_workspace_bytes", "What the workspaces of jobs take.", look.workspace_bytes),
            ("rvmcv_disk_free_bytes", "Bytes free on the disk of the workspaces.", look.free_bytes),
            ("rvmcv_model_store_bytes", "What the model store takes.", look.model_store_bytes),
        ):
            if size_bytes is not None and look.age_s < SILENT_S:
                yield _gauge(family, told, size_bytes)


def _gauge(name: str, told: str, value: float) -> Metric:
    return GaugeMetricFamily(name, told, value=value)


def _by(name: str, told: str, label: str, figures: Mapping[Any, float | None]) -> Metric:
    """Return a family with a sample for each value of a label, leaving out figures that nobody knows."""
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name, told, labels=[label])
    for value, figure in figures.items():
        if figure is not None:
            family.add_metric([str(value)], figure)
    return family
