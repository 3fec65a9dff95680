"""Run one child to its end: start, listen, watch its limits, stop it when asked, tell how it went.

After `run_child` has returned or raised, no process of the child's tree exists, and `out/<name>.log`
holds what it printed.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker import errors, framing
from rvmcv_worker.child_log import ChildLog, harmless_text
from rvmcv_worker.config import LimitSettings
from rvmcv_worker.errors import InternalError, JobCrashedError, JobError, OutOfMemoryError, TimedOutError
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.launch import PYTHON
from rvmcv_worker.process_tree import ProcessTree
from rvmcv_worker.quota import DiskQuota, MemoryLimit, check_processes
from rvmcv_worker.sandbox import Sandbox
from rvmcv_worker.spawner import Spawner
from rvmcv_worker.workspace import Workspace

#: What a child is; its name follows as the last argument.
CHILD = (*PYTHON, "-m", "rvmcv_worker.compute.child")

#: What a child may say went wrong. Other codes speak of what only the daemon does; taken from a child
#: they would have its job handed back without end.
_CHILDS_CODES = frozenset(
    {
        "invalid_job",
        "unsupported_job",
        "dataset_invalid",
        "model_invalid",
        "image_invalid",
        "out_of_gpu_memory",
        "out_of_memory",
        "disk_quota",
        "timed_out",
        "internal",
    }
)
_TICK_S = 1.0
_READ_BYTES = 64 * 1024
#: What a pipe holds where the system lets it: also what is read of a flooded log in a second.
_PIPE_BYTES = 1024 * 1024
#: Lines of a child's output that an error message quotes.
_QUOTED_LINES = 8


@dataclass(frozen=True)
class ChildSpec:
    """A child to run: `job` is its `job.json`, but for the descriptor of the progress pipe."""

    name: str
    job: dict[str, Any]
    timeout_s: float
    #: Directories of earlier children, which it may read.
    readable: tuple[str, ...] = ()
    #: The N of each `/dev/nvidiaN` it may use, and how much of the memory of each.
    gpus: tuple[int, ...] = ()
    gpu_memory_fraction: float = 1.0
    #: Raises `WorkerUnfitError` when its GPUs are gone; with True it looks at them anew.
    check_gpus: Callable[[bool], None] = lambda _again: None


@dataclass(frozen=True)
class ChildEnd:
    """How a child that succeeded ended; CPU time and memory are sampled once a second."""

    result: dict[str, Any]
    log_tail: str
    seconds: float
    cpu_s: float
    peak_memory_bytes: int


def run_child(
    spec: ChildSpec,
    *,
    workspace: Workspace,
    sandbox: Sandbox,
    spawner: Spawner,
    limits: LimitSettings,
    interrupt: Interrupt,
    on_progress: Callable[[dict[str, Any]], None],
    term_grace_s: float | None = None,
    cancel_grace_s: float | None = None,
    log: Callable[[str], None] | None = None,
    command: Sequence[str] = CHILD,
) -> ChildEnd:
    """Run a child; raises the `JobError` it ended with, or what `interrupt.check` raises.

    `on_progress` and `log` are called from this thread and must not block: meanwhile nothing is watched.
    The graces, taken from `limits` unless given, are the seconds between SIGTERM and the end.
    """
    interrupt.check()
    spec.check_gpus(False)
    started_s = time.monotonic()
    oom_kills = _oom_kills()
    child_log = ChildLog(workspace.out_dir / f"{spec.name}.log", int(limits.max_log_mb * 1e6), log)
    with contextlib.closing(child_log), _pipe() as progress, _pipe(_PIPE_BYTES) as output:
        workspace.write_job(spec.name, {**spec.job, "progress_fd": progress.write_fd})
        disk = DiskQuota(workspace, spec.name, limits)
        try:
            tree = sandbox.start(
                [*command, spec.name],
                workspace=workspace,
                writable=spec.name,
                readable=spec.readable,
                gpus=spec.gpus,
                gpu_memory_fraction=spec.gpu_memory_fraction,
                keep_fds=(progress.write_fd,),
                output=output.write_fd,
                limits=limits,
                spawner=spawner,
            )
        except InternalError as error:
            while data := _read(output.read_fd):
                child_log.feed(data)
            child_log.close()
            raise InternalError(f"{error.message}\n{child_log.tail}".rstrip()) from error
        finally:
            progress.close_write()
            output.close_write()
        with contextlib.closing(tree):
            run = _Run(
                tree=tree,
                progress_fd=progress.read_fd,
                output_fd=output.read_fd,
                child_log=child_log,
                interrupt=interrupt,
                on_progress=on_progress,
                graces_s={
                    StopReason.WORKER_STOPPED: limits.term_grace_s if term_grace_s is None else term_grace_s,
                    StopReason.CANCELLED: limits.cancel_grace_s if cancel_grace_s is None else cancel_grace_s,
                },
            )
            memory = MemoryLimit(tree, limits)
            try:
                checks = (
                    lambda: check_processes(tree),
                    memory.check,
                    lambda: disk.check(tree),
                    lambda: spec.check_gpus(False),
                )
                run.watch(spec.timeout_s, checks)
            finally:
                tree.kill()
                run.drain()
            status = tree.exit_status()
        child_log.close()
    interrupt.check()
    if run.verdict:
        raise run.verdict
    try:
        result = _result(workspace, spec.name, status, child_log.tail, oom_killed=_oom_kills() > oom_kills)
    except JobError:
        # A child that may write no more, or has no GPU any more, fails in its own words before it is seen.
        disk.check_whole()
        spec.check_gpus(True)
        raise
    seconds = time.monotonic() - started_s
    return ChildEnd(result, child_log.tail, seconds, memory.cpu_s, memory.peak_bytes)


class _Run:
    """One child while it runs: what it says is taken in, what it takes is watched."""

    def __init__(
        self,
        *,
        tree: ProcessTree,
        progress_fd: int,
        output_fd: int,
        child_log: ChildLog,
        interrupt: Interrupt,
        on_progress: Callable[[dict[str, Any]], None],
        graces_s: dict[StopReason, float],
    ) -> None:
        self._tree = tree
        self._progress_fd = progress_fd
        self._output_fd = output_fd
        self._log = child_log
        self._interrupt = interrupt
        self._on_progress = on_progress
        self._graces_s = graces_s
        self._decoder = framing.Decoder()
        self._selector = selectors.DefaultSelector()
        self._kill_at_s: float | None = None
        self._stopping_for: StopReason | None = None
        #: Why the daemon ended the child, if it did.
        self.verdict: JobError | None = None
        self.ended_by_itself = False

    def watch(self, timeout_s: float, checks: Sequence[Callable[[], None]]) -> None:
        """Return when the child has exited or must be killed; `verdict` says why."""
        end_at_s = time.monotonic() + timeout_s
        next_tick_s = time.monotonic()
        with self._selector:
            self._selector.register(self._tree, selectors.EVENT_READ, self._exited)
            self._selector.register(self._interrupt, selectors.EVENT_READ, self._interrupted)
            self._selector.register(self._progress_fd, selectors.EVENT_READ, self._read_progress)
            self._selector.register(self._output_fd, selectors.EVENT_READ, self._read_output)
            while not self.ended_by_itself:
                wake_s = min(next_tick_s, end_at_s, self._kill_at_s or math.inf)
                events = self._selector.select(max(0.0, wake_s - time.monotonic()))
                try:
                    for key, _ in events:
                        key.data()
                    now_s = time.monotonic()
                    if self._kill_at_s is not None and now_s >= self._kill_at_s:
                        return
                    if now_s >= next_tick_s:
                        self._tick(checks)
                        next_tick_s = time.monotonic() + _TICK_S
                except JobError as error:
                    self.verdict = error
                    return
                if now_s >= end_at_s and self._kill_at_s is None:
                    self.verdict = TimedOutError(f"the job ran longer than the {timeout_s:g} s it may")
                    self._ask_to_end(self._graces_s[StopReason.CANCELLED])
                    end_at_s = math.inf

    def drain(self) -> None:
        """Take in what a dead child has left in its pipes."""
        while data := _read(self._output_fd):
            self._log.feed(data)
        if self.verdict or self._interrupt.reason:
            return
        try:
            while data := _read(self._progress_fd):
                self._hear(data)
        except JobError as error:
            self.verdict = error

    def _tick(self, checks: Sequence[Callable[[], None]]) -> None:
        if self._interrupt.reason is not self._stopping_for:
            self._stop_for_interrupt()  # fenced after it was stopped: less time
        if self._log.is_full:
            self._read_output()
        for check in checks:
            check()

    def _exited(self) -> None:
        self.ended_by_itself = True

    def _interrupted(self) -> None:
        self._selector.unregister(self._interrupt)  # it stays readable
        self._stop_for_interrupt()

    def _stop_for_interrupt(self) -> None:
        reason = self._stopping_for = self._interrupt.reason
        stopped = reason is StopReason.WORKER_STOPPED
        self._ask_to_end(self._graces_s[StopReason.WORKER_STOPPED if stopped else StopReason.CANCELLED])

    def _ask_to_end(self, grace_s: float) -> None:
        kill_at_s = time.monotonic() + grace_s
        if self._kill_at_s is None:
            self._tree.terminate()
        self._kill_at_s = min(kill_at_s, self._kill_at_s or math.inf)

    def _read_progress(self) -> None:
        data = _read(self._progress_fd)
        if data is None:
            return
        if not data:
            self._selector.unregister(self._progress_fd)
        else:
            self._hear(data)

    def _hear(self, data: bytes) -> None:
        try:
            for header, _ in self._decoder.feed(data, time.monotonic()):
                self._on_progress(header)
        except framing.FramingError as error:
            raise JobCrashedError(
                f"the job's process broke the rules of its progress pipe: {error}"
            ) from None

    def _read_output(self) -> None:
        for _ in range(_PIPE_BYTES // _READ_BYTES):
            data = _read(self._output_fd)
            if not data:
                break
            self._log.feed(data)
        # A full log is read once a second: a flood waits in its pipe and costs the child's time, not ours.
        if (data == b"" or self._log.is_full) and self._output_fd in self._selector.get_map():
            self._selector.unregister(self._output_fd)


@dataclass
class _Pipe:
    """A pipe from a child; the daemon's end does not block."""

    read_fd: int
    write_fd: int

    def close_write(self) -> None:
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1


@contextlib.contextmanager
def _pipe(size_bytes: int = 0) -> Iterator[_Pipe]:
    pipe = _Pipe(*os.pipe())
    if size_bytes:
        with contextlib.suppress(OSError):  # /proc/sys/fs/pipe-max-size, or all that one user may have
            fcntl.fcntl(pipe.read_fd, fcntl.F_SETPIPE_SZ, size_bytes)
    os.set_blocking(pipe.read_fd, False)
    try:
        yield pipe
    finally:
        pipe.close_write()
        os.close(pipe.read_fd)


def _read(fd: int) -> bytes | None:
    """Return what has come, b"" at the end, None when nothing has come."""
    try:
        return os.read(fd, _READ_BYTES)
    except BlockingIOError:
        return None


def _result(workspace: Workspace, name: str, status: int, tail: str, *, oom_killed: bool) -> dict[str, Any]:
    """Return a dead child's result, or raise what went wrong; `status` as `Popen.returncode` has it."""
    if status in {0, 1}:
        answer = workspace.read_result(name) or {}
        result, error, detail = answer.get("result"), answer.get("error"), answer.get("detail")
        if status == 0 and answer.get("ok") is True and isinstance(result, dict):
            return result
        if status == 1 and isinstance(error, dict):
            raise _error_of(error, detail if isinstance(detail, dict) else None, oom_killed=oom_killed)
    if status == -signal.SIGKILL and oom_killed:
        raise OutOfMemoryError("the kernel killed the job's process because the machine ran out of memory")
    what = f"ended by {signal_name(-status)}" if status < 0 else f"exited with status {status}"
    last = "\n".join(tail.splitlines()[-_QUOTED_LINES:])
    without = " and without a result" if status in {0, 1} else ""
    raise JobCrashedError(
        f"the {name} process {what}{without}; its last lines:\n{last or '(it printed nothing)'}"
    )


def _error_of(error: dict[str, Any], detail: dict[str, Any] | None, *, oom_killed: bool) -> JobError:
    code, message = error.get("code"), harmless_text(str(error.get("message", "")))
    if not isinstance(code, str) or code not in _CHILDS_CODES:
        found: JobError = JobCrashedError(
            f"the job's process reported an error that is not its to report: {message}"
        )
    elif code == InternalError.code and oom_killed:
        found = OutOfMemoryError(f"the machine ran out of memory while the job ran: {message}")
    else:
        found = errors.from_code(code, message)
    found.detail = detail
    return found


def signal_name(number: int) -> str:
    """Return what a signal is called."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since the machine started."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0
