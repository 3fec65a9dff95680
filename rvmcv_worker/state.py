"""What the worker is at this moment: which lanes may claim and why not, what runs, what it has done."""

from __future__ import annotations

import enum
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.protocol import DesiredState, JobTotals, WorkerState


class Lane(enum.Enum):
    """A queue of its own with its own slots, so that one kind of work never delays another."""

    TRAIN = "train"  #: hours on a GPU
    INFER = "infer"  #: milliseconds; somebody waits for it
    BATCH = "batch"  #: minutes to a night of many images


@dataclass(frozen=True)
class RunningJob:
    """An attempt that this worker holds."""

    job_id: str
    job_type: str
    lane: Lane
    attempt: int
    lease_token: str
    interrupt: Interrupt
    started_s: float = field(default_factory=time.monotonic)


class Condition:
    """Shared by all threads of the daemon; `changed` wakes the heartbeat so that RVM-Server hears at once."""

    def __init__(self) -> None:
        self.changed = threading.Event()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._reasons: dict[str, tuple[str, frozenset[Lane]]] = {}
        self._running: dict[str, RunningJob] = {}
        self._desired = DesiredState.RUN
        self._ends: Counter[str] = Counter()
        self._durations_s: dict[str, list[float]] = {}
        self._last_hour: deque[float] = deque()
        #: Set once the daemon before has been settled: only then RVM-Server hears of this one.
        self.settled = threading.Event()
        self.stopping = threading.Event()

    def degrade(self, source: str, reason: str, lanes: frozenset[Lane] = frozenset(Lane)) -> bool:
        """Note a fault that keeps `lanes` from claiming; True when it is news."""
        with self._lock:
            news = self._reasons.get(source) != (reason, lanes)
            self._reasons[source] = (reason, lanes)
        if news:
            self.changed.set()
        return news

    def recover(self, source: str) -> bool:
        """Note that a fault is over; True when it was there."""
        with self._lock:
            news = self._reasons.pop(source, None) is not None
        if news:
            self.changed.set()
        return news

    def want(self, desired: DesiredState) -> None:
        """Follow RVM-Server's wish; a drain hands back what runs."""
        with self._lock:
            if desired is self._desired:
                return
            self._desired = desired
            running = list(self._running.values())
        if desired is DesiredState.DRAIN:
            self.interrupt_all(running, "the worker is drained")
        self.changed.set()

    @staticmethod
    def interrupt_all(jobs: list[RunningJob], why: str) -> None:
        """Ask running jobs to end and be handed back."""
        for job in jobs:
            job.interrupt.request(StopReason.WORKER_STOPPED, why)

    def claims(self, lane: Lane, *, despite: str | None = None) -> bool:
        """Whether the lane may claim now; `despite` is a fault that claiming itself finds to be over."""
        with self._lock:
            wanted = self._desired is DesiredState.RUN and not self.stopping.is_set()
            faults = [lanes for source, (_, lanes) in self._reasons.items() if source != despite]
            return wanted and not any(lane in lanes for lanes in faults)

    def reasons(self) -> list[str]:
        """Every fault at this moment, as sentences."""
        with self._lock:
            return [reason for reason, _ in self._reasons.values()]

    def state(self) -> WorkerState:
        """The one word for all of it."""
        with self._lock:
            if self._reasons:
                return WorkerState.DEGRADED
            if self.stopping.is_set() or self._desired is DesiredState.DRAIN:
                return WorkerState.DRAINING
            if self._desired is DesiredState.PAUSE:
                return WorkerState.PAUSED
            return WorkerState.BUSY if self._running else WorkerState.READY

    def started(self, job: RunningJob) -> None:
        """Note an attempt that begins; one claimed while a stop or drain came ends at once."""
        with self._lock:
            self._running[job.job_id] = job
            unwanted = self.stopping.is_set() or self._desired is DesiredState.DRAIN
        if unwanted:
            self.interrupt_all([job], "the worker was stopping when the claim was accepted")
        self.changed.set()

    def ended(self, job: RunningJob, status: str) -> None:
        """Note an attempt that is over, with the protocol's status (or ``fenced``)."""
        now_s = time.monotonic()
        with self._lock:
            self._running.pop(job.job_id, None)
            self._ends[status] += 1
            self._durations_s.setdefault(job.job_type, []).append(now_s - job.started_s)
            del self._durations_s[job.job_type][:-100]
            self._last_hour.append(now_s)
            self._idle.notify_all()
        self.changed.set()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs; False when that took longer than `timeout_s`."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._running, timeout_s)

    def running(self) -> list[RunningJob]:
        """Every attempt that this worker holds now."""
        with self._lock:
            return list(self._running.values())

    def totals(self, outbox: int) -> JobTotals:
        """What this worker did since its start; `outbox` is how many final reports wait."""
        now_s = time.monotonic()
        with self._lock:
            while self._last_hour and now_s - self._last_hour[0] > 3600:
                self._last_hour.popleft()
            completed, failed = self._ends["completed"], self._ends["failed"]
            return JobTotals(
                running=len(self._running),
                completed=completed,
                failed=failed,
                cancelled=self._ends["cancelled"],
                success_rate=round(completed / (completed + failed), 3) if completed + failed else None,
                average_s={
                    job_type: round(sum(durations) / len(durations), 3)
                    for job_type, durations in self._durations_s.items()
                },
                per_hour=float(len(self._last_hour)),
                outbox=outbox,
            )
