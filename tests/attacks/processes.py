"""Other processes, and staying alive."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from tests.attacks.attack import attack, first_reached, others, syscall

#: Enough to show that there is no end.
_BOMB_PROCESSES = 400


@attack("kill another job's process")
def _kill(targets: dict[str, Any]) -> str:
    os.kill(targets["victim_pid"], signal.SIGKILL)
    return f"process {targets['victim_pid']}"


@attack("signal the daemon")
def _signal(targets: dict[str, Any]) -> str:
    os.kill(targets["daemon_pid"], signal.SIGCONT)
    return f"process {targets['daemon_pid']}"


@attack("set the daemon's limits")
def _others_limits(targets: dict[str, Any]) -> str:
    def change(pid: str) -> str:
        resource.prlimit(int(pid), resource.RLIMIT_CORE, (0, 0))
        return f"no core dumps of process {pid}"

    return first_reached([str(targets["daemon_pid"]), str(targets["victim_pid"])], change)


@attack("make its parent's child")
def _sibling(_: dict[str, Any]) -> str:
    of_my_parent = 0x8000
    if syscall(56, ctypes.c_long(of_my_parent | signal.SIGCHLD), None, None, None, None) == 0:
        os._exit(0)
    return "a child of its parent"


@attack("kill all that it can", alone=True)
def _kill_all(targets: dict[str, Any]) -> str:
    if targets["walled"]:
        os.kill(-1, signal.SIGKILL)
    else:  # the same call would end whatever else this user runs
        os.kill(targets["victim_pid"], signal.SIGKILL)
    return "all"


@attack("trace its parent", needs="kernel.yama.ptrace_scope = 0, or root")
def _trace_parent(_: dict[str, Any]) -> str:
    return _traced(os.getppid())


@attack("trace the daemon, or the first process", needs="kernel.yama.ptrace_scope = 0, or root")
def _trace(targets: dict[str, Any]) -> str:
    return first_reached([str(pid) for pid in others(targets)], lambda pid: _traced(int(pid)))


def _traced(pid: int) -> str:
    seize = 0x4206  # stops nothing
    syscall(101, ctypes.c_long(seize), pid, None, None)
    return f"process {pid}"


@attack("take a descriptor out of another process", needs="kernel.yama.ptrace_scope = 0, or root")
def _pidfd_getfd(targets: dict[str, Any]) -> str:
    def take(pid: str) -> str:
        taken = syscall(438, os.pidfd_open(int(pid)), 1, 0)
        return os.readlink(f"/proc/self/fd/{taken}")

    return first_reached([str(pid) for pid in [*others(targets), os.getppid()]], take)


@attack("leave a process behind")
def _orphan(targets: dict[str, Any]) -> str:
    pause = "import signal\nwhile True: signal.pause()"
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.closerange(3, 100)
            os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", pause, targets["orphan"]])
        os._exit(0)
    os.wait()
    return "left; whether it lives on is for the daemon to see"


@attack("a fork bomb", alone=True)
def _fork_bomb(targets: dict[str, Any]) -> str:
    return _bomb(targets, signal.pause)


@attack("take all numbers of processes by dead ones", alone=True)
def _zombies(targets: dict[str, Any]) -> str:
    return _bomb(targets, lambda: os._exit(0))


def _bomb(targets: dict[str, Any], live: Callable[[], object]) -> str:
    pids: list[int] = []
    try:
        while len(pids) < _BOMB_PROCESSES:
            pid = os.fork()
            if pid == 0:
                live()
            pids.append(pid)
    except OSError:
        pass
    if targets["walled"]:
        signal.pause()  # until it is ended for it
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return "without an end" if len(pids) == _BOMB_PROCESSES else ""
