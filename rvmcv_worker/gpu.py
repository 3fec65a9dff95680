"""The NVIDIA GPUs of this machine, watched by a thread of its own: NVML may block for as long as it likes.

Everybody else sees the last reading. When that grows old, the GPUs count as unfit until NVML answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pynvml

from rvmcv_worker import nvml
from rvmcv_worker.config import Settings
from rvmcv_worker.errors import WorkerUnfitError
from rvmcv_worker.events import Event, event
from rvmcv_worker.gpu_fault import FaultKind, GpuFault, job_bytes, judge
from rvmcv_worker.nvml import GpuIdentity, GpuReading, NvmlSession

#: Seconds between two readings.
_READ_S = 1.0
#: NVML is opened anew so long after it failed or lost a GPU.
_REOPEN_S = 10.0
#: A GPU gets no job so long after a critical Xid; each further one starts the time anew.
_XID_REST_S = 600.0
#: A reading older than this counts as none. Not below 2 s however waiting times are scaled.
_STALE_S, _STALE_LEAST_S = 15.0, 2.0
#: A start waits so long for the first reading.
_FIRST_S = 3.0
#: `check` waits so long for a reading that is newer than the question.
_REFRESH_S = 3.0


@dataclass(frozen=True)
class _Look:
    """What one look at the GPUs found; `begun_s` is when it began."""

    begun_s: float
    #: Why NVML as a whole does not work, or "".
    error: str = ""
    driver: str = ""
    #: One sentence for each GPU that is listed and was never seen open.
    closed: tuple[str, ...] = ()
    readings: Mapping[int, GpuReading] = field(default_factory=dict)
    faults: Mapping[int, GpuFault] = field(default_factory=dict)


class Gpus:
    """The GPUs by an index that stays theirs for the daemon's life, also when they come and go."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        wanted = settings.worker.gpu
        #: Whether trainings need a GPU here; else they run on the CPU.
        self.expected = wanted == "required" or (wanted == "auto" and nvml.is_installed())
        self._known: list[GpuIdentity] = []
        self._xids: dict[str, tuple[int, float]] = {}
        self._session: NvmlSession | None = None
        self._reopen_at_s = 0.0
        self._look = _Look(time.monotonic(), error="NVML was not asked yet")
        self._looked = threading.Condition()
        if self.expected:
            threading.Thread(target=self._run, name="gpu-watch", daemon=True).start()
            self._wait_for_look(after_s=self._look.begun_s, timeout_s=_FIRST_S)

    @property
    def count(self) -> int:
        """How many GPUs have been seen; those that are lost count too."""
        return len(self._known)

    @property
    def driver(self) -> str:
        """Version of the NVIDIA driver, or ""."""
        return self._look.driver

    @property
    def reason(self) -> str:
        """Why there are no GPUs, or "" when there are."""
        if not self.expected:
            return "no NVIDIA driver" if self._settings.worker.gpu == "auto" else '[worker] gpu = "none"'
        if self._known:
            return ""
        return self._silence() or self._look.error or "; ".join(self._look.closed) or "NVML lists none"

    @property
    def closed(self) -> tuple[str, ...]:
        """One sentence for each GPU that NVML lists and has never let us open."""
        return self._look.closed

    def identity(self, index: int) -> GpuIdentity:
        """Return what does not change about a GPU."""
        return self._known[index]

    def readings(self) -> dict[int, GpuReading | None]:
        """Return the last reading of every GPU; None for one that does not answer."""
        look = self._look
        current = {} if self._silence() else look.readings
        return {index: current.get(index) for index in range(self.count)}

    def faults(self) -> dict[int, GpuFault]:
        """Return why GPUs get no job now, by index."""
        look = self._look
        whole: GpuFault | None = None
        if silence := self._silence():
            whole = GpuFault(FaultKind.SILENT, silence)
        elif look.error:
            whole = GpuFault(FaultKind.NVML, look.error)
        return dict.fromkeys(range(self.count), whole) if whole else dict(look.faults)

    def unfit(self) -> frozenset[int]:
        """Return the GPUs that get no job now."""
        return frozenset(self.faults())

    def check(self, indexes: Sequence[int], *, again: bool = False) -> None:
        """Raise `WorkerUnfitError` when a job on these GPUs cannot go on; `again` looks at them anew."""
        if again and indexes:
            self._wait_for_look(after_s=time.monotonic(), timeout_s=_REFRESH_S)
        faults = self.faults()
        for index in indexes:
            if (fault := faults.get(index)) and fault.ends_jobs:
                raise WorkerUnfitError(f"{fault.sentence}: the job goes back to the queue")

    def memory_fraction(self, indexes: Sequence[int]) -> float:
        """Return the share of each of these GPUs' memory that a job may take."""
        shares = [
            job_bytes(gpu, self._settings) / gpu.memory_total_bytes for gpu in map(self.identity, indexes)
        ]
        return min(shares, default=1.0)

    def _silence(self) -> str:
        stale_s = max(_STALE_LEAST_S, self._settings.scaled(_STALE_S))
        if time.monotonic() - self._look.begun_s > stale_s:
            return f"NVML does not answer for more than {stale_s:g} s: see `nvidia-smi` and `dmesg`"
        return ""

    def _wait_for_look(self, *, after_s: float, timeout_s: float) -> None:
        with self._looked:
            self._looked.wait_for(lambda: self._look.begun_s > after_s, timeout_s)

    # -- the thread's own ------------------------------------------------------------------------

    def _run(self) -> None:
        never = threading.Event()
        while True:
            try:
                look = self._next_look()
            except Exception as error:  # noqa: BLE001 - without this thread no GPU would ever work again
                event(Event.WORKER_FAULT).exception(
                    "a fault of the worker's own while reading the GPUs: it goes on; please report it "
                    "with these lines"
                )
                look = _Look(time.monotonic(), error=f"reading the GPUs fails: {error}")
            with self._looked:
                self._look = look
                self._looked.notify_all()
            pause_s = max(0.05, self._settings.scaled(_READ_S))
            if self._session is None or not self._hear(pause_s):
                never.wait(pause_s)

    def _next_look(self) -> _Look:
        begun_s = time.monotonic()
        if self._reopen_at_s and begun_s >= self._reopen_at_s:
            self._close()
        try:
            session = self._session = self._session or self._open()
        except pynvml.NVMLError as error:
            self._reopen_later()
            return _Look(begun_s, error=f"NVML: {error}")
        readings: dict[int, GpuReading] = {}
        faults: dict[int, GpuFault] = {}
        there = {gpu.uuid for gpu in session.gpus}
        missing = [gpu for gpu in self._known if gpu.uuid not in there]
        for index, gpu in enumerate(self._known):
            which = f"GPU {index} ({gpu.name})"
            if gpu in missing:
                faults[index] = _why_missing(which, session.closed)
                continue
            try:
                reading = readings[index] = session.read(gpu.uuid)
            except pynvml.NVMLError as error:
                kind = FaultKind.LOST if nvml.is_gone(error) else FaultKind.NVML
                faults[index] = GpuFault(kind, f"{which}: NVML: {error}")
                continue
            fault = judge(
                index,
                gpu,
                reading,
                settings=self._settings,
                xid=self._xid(gpu.uuid),
                before=self._look.faults.get(index),
            )
            if fault:
                faults[index] = fault
        if session.closed or any(fault.kind in {FaultKind.LOST, FaultKind.NVML} for fault in faults.values()):
            self._reopen_later()  # only a new session sees what has come back
        closed: tuple[str, ...] = ()
        if not missing:  # else the one that cannot be opened is one that is missed
            closed = tuple(f"a GPU cannot be opened: NVML: {error}" for error in session.closed)
        return _Look(begun_s, "", session.driver, closed, readings, faults)

    def _open(self) -> NvmlSession:
        session = NvmlSession()
        self._reopen_at_s = 0.0
        known = {gpu.uuid for gpu in self._known}
        self._known += [gpu for gpu in session.gpus if gpu.uuid not in known]
        return session

    def _reopen_later(self) -> None:
        if not self._reopen_at_s:
            self._reopen_at_s = time.monotonic() + self._settings.scaled(_REOPEN_S)

    def _close(self) -> None:
        self._reopen_at_s = 0.0
        if self._session:
            self._session.close()
            self._session = None

    def _hear(self, within_s: float) -> bool:
        """Wait for an Xid until the next reading is due; False when this machine's NVML tells of none."""
        session = self._session
        if session is None or not session.hears_xids:
            return False
        try:
            heard = session.next_xid(within_s)
        except pynvml.NVMLError:
            return False
        if heard and heard[1] not in nvml.APPLICATION_XIDS:
            self._xids[heard[0]] = (heard[1], time.monotonic())
        return True

    def _xid(self, uuid: str) -> int | None:
        """Return the Xid that the GPU is still to recover from."""
        xid, at_s = self._xids.get(uuid, (None, 0.0))
        return xid if time.monotonic() - at_s < self._settings.scaled(_XID_REST_S) else None


def _why_missing(which: str, closed: Sequence[pynvml.NVMLError]) -> GpuFault:
    """Return the fault of a GPU that a new session lacks; `closed` are its errors when opening GPUs."""
    for error in closed:
        if not nvml.is_gone(error):
            return GpuFault(FaultKind.NVML, f"{which} cannot be opened: NVML: {error}")
    return GpuFault(FaultKind.LOST, f"{which} is not there any more")
