"""One engine behind the wall, from its start to its end; all of it for one thread."""

from __future__ import annotations

import collections
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rvmcv_worker import framing, workspace
from rvmcv_worker.child_log import ChildLog
from rvmcv_worker.config import LimitSettings, Settings
from rvmcv_worker.engine_answer import MAX_PAYLOAD_BYTES
from rvmcv_worker.engine_wire import Request
from rvmcv_worker.errors import DiskQuotaError, JobCrashedError, JobError, OutOfMemoryError, WorkerUnfitError
from rvmcv_worker.executor import CHILD, signal_name
from rvmcv_worker.gpu import Gpus
from rvmcv_worker.gpu_fault import FaultKind
from rvmcv_worker.quota import DiskQuota, check_processes
from rvmcv_worker.sandbox import Sandbox
from rvmcv_worker.spawner import Spawner
from rvmcv_worker.workspace import Workspace

#: The engine's own directory, and the task that it runs.
NAME = "engine"
#: What each of the two engines, and the child that measures a model, may allocate of the engines' part of a
#: GPU's memory (`limits.engine_gpu_memory_gb`): together no more than all of it.
ENGINE_SHARE, EXPORT_SHARE = 0.4, 0.2
_READ_BYTES = 1024 * 1024
#: Lines of an engine's output that an error message quotes.
_QUOTED_LINES = 8
_GB = 1024**3
#: What an engine may write into its directory: its libraries' settings and caches, a few MB.
_OWN_FILES_GB = 1.0


class EngineFaultError(Exception):
    """The engine cannot go on; `error` is what a request that did this alone ends with."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True)
class Machine:
    """What it takes to start an engine."""

    settings: Settings
    sandbox: Sandbox
    spawner: Spawner
    gpus: Gpus

    def choose_gpu(self) -> int | None:
        """Return the GPU with the most free memory, by its index; None for the CPU.

        One that is too full for a training may well do for an engine, whose part is its own.
        """
        faults = self.gpus.faults()
        free = {
            index: reading.memory_free_bytes
            for index, reading in self.gpus.readings().items()
            if reading and (index not in faults or faults[index].kind is FaultKind.FULL)
        }
        return max(free, key=lambda index: free[index], default=None)

    def device_numbers(self, gpu: int | None) -> tuple[int, ...]:
        """Return the N of the `/dev/nvidiaN` that a child on this GPU, or on the CPU, may use."""
        return () if gpu is None else (self.gpus.identity(gpu).device_number,)

    def gpu_memory_fraction(self, gpu: int | None, share: float) -> float:
        """Return how much of a GPU's memory a process may allocate that has `share` of the engines' part."""
        if gpu is None:
            return 1.0
        part_bytes = self.settings.limits.engine_gpu_memory_gb * _GB
        return min(1.0, share * part_bytes / self.gpus.identity(gpu).memory_total_bytes)

    def embedding_cache_bytes(self, gpu: int | None) -> int:
        """Return how much encoded images an engine may keep: on a GPU a quarter of its part at most."""
        settings = self.settings
        wanted = settings.inference.embedding_cache_mb * 1024**2
        engine_bytes = ENGINE_SHARE * settings.limits.engine_gpu_memory_gb * _GB
        return int(wanted if gpu is None else min(wanted, engine_bytes / 4))

    @property
    def memory_limit_bytes(self) -> int:
        """What an engine may hold at most; from half of it on it drops models by itself."""
        return int(2 * self.settings.inference.engine_memory_gb * _GB)

    @property
    def limits(self) -> LimitSettings:
        """The limits of a child that is none of a job's."""
        return self.settings.limits.model_copy(update={"max_job_memory_gb": self.memory_limit_bytes / 1e9})


class EngineProcess:
    """A started engine; whoever holds it watches `selectors` events, and calls `end` at last."""

    def __init__(self, machine: Machine, place: Workspace) -> None:
        """Start it. Raises `JobError` when that cannot be done."""
        settings = machine.settings
        self._machine = machine
        self._limit_bytes = machine.memory_limit_bytes
        self.gpu = machine.choose_gpu()
        self.device = "the CPU" if self.gpu is None else f"GPU {self.gpu}"
        #: What it held when it was looked at last.
        self.memory_bytes = 0
        self._out: collections.deque[memoryview] = collections.deque()
        self._decoder = framing.Decoder(max_payload_bytes=MAX_PAYLOAD_BYTES, max_per_s=None)
        self._selector: selectors.BaseSelector | None = None
        workspace.wipe(place.root / NAME)
        log_file = place.out_dir / f"{NAME}.log"
        log_file.unlink(missing_ok=True)
        self._log = ChildLog(log_file, int(settings.limits.max_log_mb * 1e6))
        self._socket, theirs = socket.socketpair()
        self._log_fd, log_write_fd = os.pipe()
        self._socket.setblocking(False)
        os.set_blocking(self._log_fd, False)
        try:
            place.write_job(NAME, self._job(theirs.fileno()))
            self._disk = _own_files(place, machine.limits)
            self._tree = machine.sandbox.start(
                [*CHILD, NAME],
                workspace=place,
                writable=NAME,
                gpus=machine.device_numbers(self.gpu),
                gpu_memory_fraction=machine.gpu_memory_fraction(self.gpu, ENGINE_SHARE),
                keep_fds=(theirs.fileno(),),
                output=log_write_fd,
                limits=machine.limits,
                spawner=machine.spawner,
            )
        except BaseException:
            self._close_files()
            raise
        finally:
            theirs.close()
            os.close(log_write_fd)

    def _job(self, fd: int) -> dict[str, Any]:
        inference, limits = self._machine.settings.inference, self._machine.settings.limits
        return {
            "task": NAME,
            "progress_fd": fd,
            "device": "cpu" if self.gpu is None else "0",
            "max_pixels": int(limits.max_image_megapixels * 1_000_000),
            "batch_window_ms": inference.batch_window_ms,
            "max_batch": inference.max_batch,
            "memory_bytes": int(inference.engine_memory_gb * _GB),
            "embedding_cache_bytes": self._machine.embedding_cache_bytes(self.gpu),
        }

    def watch(self, selector: selectors.BaseSelector, on_frames: Callable[[], None]) -> None:
        """Have `on_frames` called when the engine has said something, or has ended."""
        self._selector = selector
        self._on_frames = on_frames
        selector.register(self._socket, selectors.EVENT_READ, self._ready)
        selector.register(self._tree, selectors.EVENT_READ, on_frames)
        selector.register(self._log_fd, selectors.EVENT_READ, self.read_log)

    def send(self, request: Request, image: bytes) -> None:
        """Send a request, as far as the engine takes it now; the rest follows."""
        self._out.append(memoryview(framing.encode(request.to_header(), image)))
        self._flush()

    def frames(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yield what has come; raises `EngineFaultError` at the first thing amiss, and at the end."""
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                if self._tree.popen.poll() is None:
                    return
                data = b""  # dead, and a process of its own holds the other end open
            except OSError:
                data = b""
            if not data:
                raise EngineFaultError(self._death())
            try:
                yield from self._decoder.feed(data, time.monotonic())
            except framing.FramingError as error:
                raise self.fault(f"broke the rules of its stream: {error}") from None

    def fault(self, what: str) -> EngineFaultError:
        """Return the fault of an engine that lives and cannot be trusted any more."""
        return EngineFaultError(JobCrashedError(f"the inference engine {what}"))

    def check(self) -> None:
        """Look at it, once a second.

        Raises `EngineFaultError` for too much memory, too many files, or a GPU that is lost.
        """
        if self.gpu is not None:
            try:
                self._machine.gpus.check((self.gpu,))
            except JobError as error:
                raise EngineFaultError(error) from None
        if self._log.is_full:
            self.read_log()
        try:
            check_processes(self._tree)
        except JobCrashedError as error:
            raise EngineFaultError(error) from None
        try:
            self._disk.check(self._tree)
        except WorkerUnfitError:
            pass  # others have filled the disk, and its end would not help
        except DiskQuotaError as error:
            raise EngineFaultError(DiskQuotaError(f"the inference engine filled the disk: {error}")) from None
        held_bytes = self._tree.sample().memory_bytes
        if held_bytes > self._limit_bytes:
            held_bytes = self._tree.exact_memory_bytes()
        self.memory_bytes = held_bytes
        if held_bytes > self._limit_bytes:
            raise EngineFaultError(
                OutOfMemoryError(
                    f"the inference engine held {held_bytes / _GB:.3g} GiB of memory for this image, of "
                    f"at most {self._limit_bytes / _GB:g}: twice inference.engine_memory_gb"
                )
            )

    def end(self) -> str:
        """Kill it to the last process, which has nothing to save; returns the last lines that it printed."""
        if self._selector:
            for watched in (self._socket, self._tree, self._log_fd):
                if watched in self._selector.get_map():
                    self._selector.unregister(watched)
            self._selector = None
        self._tree.kill()
        self.read_log()
        self._tree.close()
        self._close_files()
        return self._log.tail

    def read_log(self) -> None:
        """Take in what it has printed."""
        try:
            while data := os.read(self._log_fd, _READ_BYTES):
                self._log.feed(data)
                if (
                    self._log.is_full
                ):  # read once a second: a flood waits in its pipe, and costs the engine's time
                    break
        except BlockingIOError:
            return
        if self._selector and self._log_fd in self._selector.get_map():
            self._selector.unregister(self._log_fd)

    def _ready(self) -> None:
        self._flush()
        self._on_frames()

    def _flush(self) -> None:
        while self._out:
            try:
                sent = self._socket.send(self._out[0])
            except BlockingIOError:
                break
            except OSError:
                self._out.clear()  # it is dead, which its frames will tell
                break
            self._out[0] = self._out[0][sent:]
            if not self._out[0]:
                self._out.popleft()
        if self._selector:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
            if self._selector.get_key(self._socket).events != events:
                self._selector.modify(self._socket, events, self._ready)

    def _death(self) -> JobError:
        """Say how it died, or that it stopped talking; it is dead afterwards."""
        self._tree.kill()
        self.read_log()
        status = self._tree.exit_status()
        what = f"was ended by {signal_name(-status)}" if status < 0 else f"exited with status {status}"
        if status == -signal.SIGKILL:
            what += " (when nobody sent it, the machine ran out of memory)"
        last = "\n".join(self._log.tail.splitlines()[-_QUOTED_LINES:])
        return JobCrashedError(
            f"the inference engine {what}; its last lines:\n{last or '(it printed nothing)'}"
        )

    def _close_files(self) -> None:
        self._socket.close()
        os.close(self._log_fd)
        self._log.close()


def _own_files(place: Workspace, limits: LimitSettings) -> DiskQuota:
    """Return the watch over what an engine writes; the models beside it are not its own."""
    beside_gb = workspace.measure(place.root).bytes / 1e9
    allowed = limits.model_copy(update={"max_workspace_gb": beside_gb + _OWN_FILES_GB})
    return DiskQuota(place, NAME, allowed)
