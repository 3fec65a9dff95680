"""A child and all that it started: signalled, measured, and killed to the last process.

Behind the wall a PID namespace holds the tree: when its first process dies, the kernel kills the rest
before that death is announced. Without the wall the tree is what descends from the child or carries
its cookie in the environment, which finds a grandchild that called `setsid` too (not one that wants
to hide: without the wall nothing is promised against malice).
"""

from __future__ import annotations

import abc
import contextlib
import functools
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from rvmcv_worker.errors import InternalError

Item = TypeVar("Item")

#: How long bwrap may take to notice that the namespace is gone, in seconds.
_REAP_S = 2.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
#: How long open files are looked through at most, in seconds: time for some 10,000.
_LOOK_S = 0.1
#: What the kernel holds for a file in memory besides its contents, in bytes.
_INODE_BYTES = 1024
#: The environment variable by which a child's descendants are known without the wall, and by which a start
#: finds what outlived a daemon.
COOKIE = "RVMCV_JOB"


@dataclass(frozen=True)
class Sample:
    """What a tree uses: memory that only its end gives back, and CPU time until now."""

    memory_bytes: int
    cpu_s: float


class ProcessTree(abc.ABC):
    """A started child; `popen` is the process that the daemon itself waits for.

    The tree is what descends from `first_pid`, which may be another.
    """

    def __init__(self, popen: subprocess.Popen[bytes], first_pid: int) -> None:
        self.popen = popen
        self._first_pid = first_pid
        self._exit_fd = os.pidfd_open(popen.pid)

    def fileno(self) -> int:
        """A descriptor that is readable once `popen` has exited (for selectors)."""
        return self._exit_fd

    @abc.abstractmethod
    def terminate(self) -> None:
        """Send SIGTERM to the child itself, so that it may write a checkpoint."""

    @abc.abstractmethod
    def kill(self, within_s: float = 30.0) -> None:
        """Kill every process and wait until none is left; raises `InternalError` when some will not die."""

    def pids(self) -> list[int]:
        """Return the processes that are known to be in the tree now: the first one and its descendants."""
        return [pid for pid in (self._first_pid, *_descendants(self._first_pid)) if not _is_dead(pid)]

    def exceeds(self, tasks: int) -> bool:
        """Return whether the tree has more processes and threads than that.

        The dead that nobody has reaped count too: each has a number of which the machine has not many.
        """
        for pid in (self._first_pid, *_descendants(self._first_pid)):
            with contextlib.suppress(OSError):  # gone meanwhile
                tasks -= len(_names(f"/proc/{pid}/task"))
            if tasks < 0:
                return True
        return False

    def hiding(self) -> int | None:
        """Return a process of the tree that does not let this user see its open files, if there is one.

        One that dies is none: it has no memory any more and belongs to root for a moment. Nor is the first,
        which behind the wall is bubblewrap's own.
        """
        for pid in _descendants(self._first_pid):
            with contextlib.suppress(OSError):
                try:
                    os.scandir(f"/proc/{pid}/fd").close()
                except PermissionError:
                    if b"VmSize" in Path(f"/proc/{pid}/status").read_bytes():
                        return pid
        return None

    @abc.abstractmethod
    def exit_status(self) -> int:
        """Return the child's status as `Popen` has it: negative for a signal; only after `kill`."""

    def shared_bytes(self) -> int:
        """Return the bytes in the tree's private in-memory file systems."""
        return 0

    def unlinked_bytes(self, device: int) -> int:
        """Return what the tree holds open on `device` of files that are in no directory any more.

        Looks for a moment, each time in another order: behind descriptors without end a file is hidden for
        some time only.
        """
        end_s = time.monotonic() + _LOOK_S
        found: dict[int, int] = {}
        for pid in _shuffled(self.pids()):
            with contextlib.suppress(OSError):  # gone meanwhile
                for descriptor in _shuffled(_names(f"/proc/{pid}/fd")):
                    with contextlib.suppress(OSError):
                        info = os.stat(f"/proc/{pid}/fd/{descriptor}")  # noqa: PTH116 - twice as fast
                        if info.st_nlink == 0 and info.st_dev == device:
                            found[info.st_ino] = info.st_blocks * 512
                    if time.monotonic() > end_s:
                        return sum(found.values())
        return sum(found.values())

    def sample(self) -> Sample:
        """Measure the tree; cheap enough for once a second. Shared pages count in each process."""
        own = mapped = 0
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError, ValueError):
                own_kb, mapped_kb = _memory_kb(pid)
                own += own_kb * 1024
                mapped += mapped_kb * 1024
                # Fields 14 to 17 of proc(5): own user and system time, then those of reaped children.
                fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
                ticks += sum(int(field) for field in fields[11:15])
        return Sample(own + max(mapped, self._held_in_files()), ticks / _TICKS_PER_S)

    def exact_memory_bytes(self) -> int:
        """Measure memory with shared pages counted once; slow for large processes.

        Where the kernel does not let us look so closely, shared pages count in each process.
        """
        own = mapped = 0
        for pid in self.pids():
            try:
                own_kb, mapped_kb = _exact_memory_kb(pid)
            except PermissionError:
                return self.sample().memory_bytes
            except (OSError, ValueError):  # gone meanwhile
                continue
            own += own_kb * 1024
            mapped += mapped_kb * 1024
        return own + max(mapped, self._held_in_files())

    def _held_in_files(self) -> int:
        """Return the bytes in files that are memory: in the tree's own file systems, and in none (memfd)."""
        return self.shared_bytes() + self.unlinked_bytes(_nameless_device())

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._exit_fd)


class NamespaceTree(ProcessTree):
    """The tree behind the wall; `init_pid` is the first process of its PID namespace, which adopts orphans.

    `status_fd`, where bubblewrap tells of itself, is kept open and closed with the tree.
    """

    def __init__(self, popen: subprocess.Popen[bytes], init_pid: int, status_fd: int) -> None:
        super().__init__(popen, init_pid)
        self._status_fd = status_fd
        try:
            self._init_fd: int | None = os.pidfd_open(init_pid)
        except ProcessLookupError:
            self._init_fd = None  # over already

    def terminate(self) -> None:
        """Send SIGTERM to the child; bubblewrap would not hand it on."""
        child = self._child()
        if child is None:
            self.kill()  # not even started: nothing to save
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    def kill(self, within_s: float = 30.0) -> None:
        """Kill the namespace's first process, and so all."""
        if self._init_fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_fd, signal.SIGKILL)
            if not _wait_readable(self._init_fd, within_s):
                raise InternalError(f"process {self._first_pid} does not die; see its state in /proc")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(_REAP_S)  # bwrap reaps the first process; killed sooner, it leaves a zombie
        _end(self.popen, within_s)

    def exit_status(self) -> int:
        """Return the status that bubblewrap handed on."""
        status = self.popen.wait()
        # bwrap tells a child's death by a signal as a shell does.
        return 128 - status if 128 < status <= 128 + signal.SIGRTMAX else status

    def shared_bytes(self) -> int:
        """Return the bytes in the own `/tmp` and `/dev/shm`, and what the kernel holds for their files."""
        child = self._child()
        total = 0
        for directory in ("tmp", "dev/shm"):
            with contextlib.suppress(OSError):
                found = os.statvfs(f"/proc/{child}/root/{directory}")
                total += (found.f_blocks - found.f_bfree) * found.f_frsize
                total += (found.f_files - found.f_ffree) * _INODE_BYTES
        return total

    def close(self) -> None:
        """Give the descriptors back."""
        super().close()
        os.close(self._status_fd)
        if self._init_fd is not None:
            os.close(self._init_fd)

    def _child(self) -> int | None:
        """The child itself: of init's children, which orphans join, the one that was there first."""
        started = []
        for pid in _children(self._first_pid):
            with contextlib.suppress(psutil.Error):
                started.append((psutil.Process(pid).create_time(), pid))
        return min(started)[1] if started else None


class CookieTree(ProcessTree):
    """The tree without a wall: what descends from the child or has its cookie."""

    def __init__(self, popen: subprocess.Popen[bytes], cookie: str) -> None:
        super().__init__(popen, popen.pid)
        self._cookie = cookie

    def terminate(self) -> None:
        """Send SIGTERM to the child."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(signal.SIGTERM)

    def kill(self, within_s: float = 30.0) -> None:
        """Kill the child, its descendants, and whatever has its cookie."""
        deadline_s = time.monotonic() + within_s
        _end(self.popen, within_s, descendants=list(_descendants(self.popen.pid)))
        kill_marked(self._cookie, deadline_s - time.monotonic())

    def exit_status(self) -> int:
        """Return the child's own status."""
        return self.popen.wait()


def kill_marked(cookie: str, within_s: float = 30.0) -> int:
    """Kill each process with this cookie, or with one beneath it; returns how many there were.

    A daemon calls it at its start too, for what an earlier one that was killed has left behind.
    """
    deadline_s = time.monotonic() + within_s
    killed: set[int] = set()
    clean_scans = 0
    while clean_scans < 2:  # a process in the middle of `exec` has no environment for a moment
        found = _marked(cookie)
        clean_scans = 0 if found else clean_scans + 1
        for pid in found:
            killed.add(pid)
            _kill_and_wait(pid, cookie, deadline_s - time.monotonic())
        if found and time.monotonic() > deadline_s:
            raise InternalError(f"processes {sorted(found)} do not die; see their states in /proc")
    return len(killed)


def _kill_and_wait(pid: int, cookie: str, within_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            if _has_cookie(pid, cookie):  # the descriptor holds the process that was meant, not a successor
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                _wait_readable(fd, max(0.0, within_s))
        finally:
            os.close(fd)


def _end(popen: subprocess.Popen[bytes], within_s: float, descendants: Iterable[int] = ()) -> None:
    popen.kill()
    for pid in descendants:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        popen.wait(within_s)
    except subprocess.TimeoutExpired:
        raise InternalError(f"process {popen.pid} does not die; see its state in /proc") from None


def _marked(cookie: str) -> list[int]:
    pids = (int(name) for name in _names("/proc") if name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and _has_cookie(pid, cookie) and not _is_dead(pid)]


def _has_cookie(pid: int, cookie: str) -> bool:
    wanted = os.fsencode(f"{COOKIE}={cookie.rstrip('/')}")
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or another user's
        return False
    # Not `startswith` alone: attempt 1 of a job is not its attempt 12.
    return any(item == wanted or item.startswith(wanted + b"/") for item in environment.split(b"\0"))


def _is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in {b"Z", b"X"}
    except OSError:
        return True


def _descendants(pid: int) -> Iterator[int]:
    waiting = [pid]
    while waiting:
        children = _children(waiting.pop())
        yield from children
        waiting += children


def _children(pid: int) -> list[int]:
    """Return a process's children, from the kernel's own list where it has one (CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    try:
        for thread in _names(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_bytes().split())
    except OSError:
        with contextlib.suppress(psutil.Error):
            return [child.pid for child in psutil.Process(pid).children()]
    return found


def _names(directory: str) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries]


def _memory_kb(pid: int) -> tuple[int, int]:
    """Return a process's own memory, swapped and page tables too, and what it has mapped of shared memory."""
    # A page of zeros counts as no memory but has a table of 4 kB: by those alone a machine can be filled.
    fields = b"RssAnon", b"VmSwap", b"VmPTE", b"RssShmem"
    *own, mapped = _fields_kb(Path(f"/proc/{pid}/status"), *fields)
    return sum(own), mapped


def _exact_memory_kb(pid: int) -> tuple[int, int]:
    """Return the same, of shared pages a process's share."""
    fields = b"Pss_Anon", b"SwapPss", b"Pss_Shmem"
    *own, mapped = _fields_kb(Path(f"/proc/{pid}/smaps_rollup"), *fields)
    return sum(own) + _fields_kb(Path(f"/proc/{pid}/status"), b"VmPTE")[0], mapped


@functools.cache
def _nameless_device() -> int:
    """Return the device on which files are that were never in a directory (memfd_create)."""
    fd = os.memfd_create("probe")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _shuffled(items: list[Item]) -> list[Item]:
    return random.sample(items, len(items))


def _fields_kb(path: Path, *names: bytes) -> list[int]:
    """Return the named fields of a file of /proc in kB; 0 for one that is not there."""
    values = dict.fromkeys(names, 0)
    for line in path.read_bytes().splitlines():
        name, _, value = line.partition(b":")
        if name in values:
            values[name] = int(value.split()[0])
    return list(values.values())


def _wait_readable(fd: int, within_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))
