"""What the worker is at this moment: which lanes may claim and why not, what runs, what it has done."""

from __future__ import annotations

import dataclasses
import enum
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.logs import redact
from rvmcv_worker.protocol import DesiredState, JobTotals, WorkerState
from rvmcv_worker.tally import Tally

#: What server and operator may wish for, the stricter the later.
_STRICTNESS = (DesiredState.RUN, DesiredState.PAUSE, DesiredState.DRAIN)
#: The source of what is said while the daemon before is being settled, and what is said at least.
SETTLEMENT = "settlement"
_UNSETTLED = "what the daemon before left is not settled yet: nothing is claimed until then"
#: How many of the last ends are shown, and are kept of each lane: inferences push no training's out.
_ENDS = 10


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
    #: The newest progress, as its reporter keeps it; parts may come from a child, unchecked.
    progress: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class JobEnd:
    """An attempt that is over."""

    job_id: str
    job_type: str
    lane: Lane
    attempt: int
    status: str  #: the protocol's, or ``fenced``
    error_code: str | None
    ended_at: datetime
    took_s: float


@dataclass(frozen=True)
class Wishes:
    """What RVM-Server and the operator want of the worker; the stricter wish holds."""

    server: DesiredState = DesiredState.RUN
    operator: DesiredState = DesiredState.RUN

    @property
    def holds(self) -> DesiredState:
        """The stricter of the two."""
        return max(self.server, self.operator, key=_STRICTNESS.index)


class Condition:
    """Shared by all threads of the daemon; `changed` wakes the heartbeat so that RVM-Server hears at once."""

    def __init__(self, tally: Tally | None = None) -> None:
        self._tally = tally or Tally()
        self.changed = threading.Event()
        #: Called, in any thread, when a wish stops the claims: held polls are then of no use.
        self.on_hold: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._woken = threading.Condition()
        self._wakes = 0
        self._reasons: dict[str, tuple[str, frozenset[Lane]]] = {}
        self._notes: dict[str, str] = {}
        self._running: dict[str, RunningJob] = {}
        self._held: set[str] = set()
        self._wishes = Wishes()
        self._last_ends: list[JobEnd] = []
        self._ends: Counter[str] = Counter()
        self._durations_s: dict[str, list[float]] = {}
        self._last_hour: deque[float] = deque()
        #: Set once what the daemon before left is wiped: only then its final reports are delivered.
        self.cleared = threading.Event()
        #: Set once the daemon before has been settled: only then RVM-Server hears of this one.
        self.settled = threading.Event()
        #: Set once RVM-Server has heard of this daemon, or could not be reached: its wishes are known now.
        self.introduced = threading.Event()
        self.stopping = threading.Event()

    def degrade(self, source: str, reason: str, lanes: frozenset[Lane] = frozenset(Lane)) -> bool:
        """Note a fault that keeps `lanes` from claiming; True when it is news."""
        reason = redact(reason)  # RVM-Server and the operator are told
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
            self.wake()
        return news

    def note(self, source: str, sentence: str | None) -> bool:
        """Tell what limits the worker without being a fault (None: no longer); True when that is news."""
        with self._lock:
            news = self._notes.get(source) != sentence
            if sentence is None:
                self._notes.pop(source, None)
            else:
                self._notes[source] = sentence
        if news:
            self.changed.set()
        return news

    def want(self, desired: DesiredState) -> bool:
        """Follow RVM-Server's wish, a drain hands back what runs; whether it is another than before."""
        return self._follow(server=desired)

    def wish(self, desired: DesiredState) -> None:
        """Follow the operator's wish; a drain hands back what runs."""
        self._follow(operator=desired)

    def _follow(self, **wish: DesiredState) -> bool:
        with self._lock:
            before, self._wishes = self._wishes, dataclasses.replace(self._wishes, **wish)
            holds, running = self._wishes.holds, list(self._running.values())
        if holds is not before.holds:
            if holds is DesiredState.DRAIN:
                self.interrupt_all(running, "the worker is drained")
            if holds is not DesiredState.RUN and self.on_hold:
                self.on_hold()
        if is_new := wish != {name: getattr(before, name) for name in wish}:
            self.wake()
        return is_new

    def wishes(self) -> Wishes:
        """What is wished for at this moment, by whom."""
        with self._lock:
            return self._wishes

    def stop(self, why: str) -> None:
        """Claim nothing any more and ask running jobs to end and be handed back; for good."""
        self.stopping.set()
        self.settled.set()
        self.introduced.set()
        self.interrupt_all(self.running(), why)
        self.wake()

    @staticmethod
    def interrupt_all(jobs: list[RunningJob], why: str) -> None:
        """Ask running jobs to end and be handed back."""
        for job in jobs:
            job.interrupt.request(StopReason.WORKER_STOPPED, why)

    def wake(self) -> None:
        """Have whoever rests look again, and RVM-Server told."""
        with self._woken:
            self._wakes += 1
            self._woken.notify_all()
        self.changed.set()

    def mark(self) -> int:
        """Return a mark for `rest`: what is woken from now on ends that, even when it comes before."""
        with self._woken:
            return self._wakes

    def rest(self, seconds: float, since: int) -> bool:
        """Wait, at most until there was a `wake` since the mark; True when the worker stops."""
        with self._woken:
            self._woken.wait_for(lambda: self._wakes != since or self.stopping.is_set(), seconds)
        return self.stopping.is_set()

    def claims(self, lane: Lane, *, despite: str | None = None) -> bool:
        """Whether the lane may claim now; `despite` is a fault that claiming itself finds to be over."""
        with self._lock:
            wanted = self._wishes.holds is DesiredState.RUN and not self.stopping.is_set()
            wanted = wanted and self.settled.is_set()
            faults = [lanes for source, (_, lanes) in self._reasons.items() if source != despite]
            return wanted and not any(lane in lanes for lanes in faults)

    def reasons(self) -> list[str]:
        """Every fault at this moment, then every note, as sentences."""
        faults = self.faults()
        with self._lock:
            return [*faults, *self._notes.values()]

    def faults(self) -> list[str]:
        """Every fault at this moment, as sentences."""
        with self._lock:
            known = SETTLEMENT in self._reasons or self.settled.is_set()
            return [*([] if known else [_UNSETTLED]), *(reason for reason, _ in self._reasons.values())]

    def fault_sources(self) -> list[str]:
        """The source of every fault at this moment: a word of the worker's own each."""
        with self._lock:
            return list(self._reasons)

    def state(self) -> WorkerState:
        """The one word for all of it."""
        with self._lock:
            if self._reasons or not self.settled.is_set():
                return WorkerState.DEGRADED
            if self.stopping.is_set() or self._wishes.holds is DesiredState.DRAIN:
                return WorkerState.DRAINING
            if self._wishes.holds is DesiredState.PAUSE:
                return WorkerState.PAUSED
            return WorkerState.BUSY if self._running else WorkerState.READY

    def hold(self, job_id: str) -> None:
        """Note, before the ledger knows of a claim, that somebody works on it: nobody else settles it."""
        with self._lock:
            self._held.add(job_id)

    def release(self, job_id: str) -> None:
        """Note that nobody works on a claim any more: what the ledger still knows of it is to be settled."""
        with self._lock:
            self._held.discard(job_id)

    def held(self) -> frozenset[str]:
        """The jobs whose claims somebody works on."""
        with self._lock:
            return frozenset(self._held)

    def started(self, job: RunningJob) -> None:
        """Note an attempt that begins; one claimed while a stop or drain came ends at once."""
        with self._lock:
            self._running[job.job_id] = job
            unwanted = self.stopping.is_set() or self._wishes.holds is DesiredState.DRAIN
        if unwanted:
            self.interrupt_all([job], "the worker was stopping when the claim was accepted")
        self.changed.set()

    def ended(self, job: RunningJob, status: str, error_code: str | None = None) -> None:
        """Note an attempt that is over, with the protocol's status (or ``fenced``)."""
        now_s = time.monotonic()
        took_s, now = now_s - job.started_s, datetime.now(timezone.utc)
        with self._lock:
            self._running.pop(job.job_id, None)
            self._ends[status] += 1
            self._durations_s.setdefault(job.job_type, []).append(took_s)
            del self._durations_s[job.job_type][:-100]
            self._last_hour.append(now_s)
            self._last_ends.append(
                JobEnd(job.job_id, job.job_type, job.lane, job.attempt, status, error_code, now, took_s)
            )
            of_lane = [end for end in self._last_ends if end.lane is job.lane]
            if len(of_lane) > _ENDS:
                self._last_ends.remove(of_lane[0])
            self._idle.notify_all()
        self._tally.ended(job.job_type, status, error_code, took_s)
        self.changed.set()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs; False when that took longer than `timeout_s`."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._running, timeout_s)

    def running(self) -> list[RunningJob]:
        """Every attempt that this worker holds now."""
        with self._lock:
            return list(self._running.values())

    def last_ends(self) -> list[JobEnd]:
        """The last attempts that are over, newest first."""
        with self._lock:
            return self._last_ends[: -_ENDS - 1 : -1]

    def end_of(self, job_id: str) -> JobEnd | None:
        """How the job's last attempt ended; None for a job that is not among the last of its lane."""
        with self._lock:
            return next((end for end in reversed(self._last_ends) if end.job_id == job_id), None)

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
