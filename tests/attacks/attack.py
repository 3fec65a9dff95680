"""What an attack is, and the few means that all of them use."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLONE_NEWUSER = 0x10000000
CLONE_NEWNS = 0x00020000

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long


@dataclass(frozen=True)
class Attack:
    """One way out; `run` returns what it has reached."""

    name: str
    run: Callable[[dict[str, Any]], str | None]
    #: Whose process it works in when nothing defends: "anyone", "root" or "ordinary" users.
    by: str
    #: What of the machine it takes for it to work at all, if that is not everywhere so.
    needs: str
    #: It would take the others with it: run in a child of its own.
    alone: bool

    def tried_as(self, user: str) -> bool:
        """Whether it means anything when the daemon is this user."""
        return self.by != "ordinary" or user != "root"


ATTACKS: list[Attack] = []


def attack(
    name: str, *, by: str = "anyone", needs: str = "", alone: bool = False
) -> Callable[[Callable[[dict[str, Any]], str | None]], Callable[[dict[str, Any]], str | None]]:
    def register(run: Callable[[dict[str, Any]], str | None]) -> Callable[[dict[str, Any]], str | None]:
        ATTACKS.append(Attack(name, run, by, needs, alone))
        return run

    return register


def read(path: str | Path) -> str:
    """Return the beginning of a file, without waiting for one that has none."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, 200).decode(errors="replace")
    finally:
        os.close(fd)


def first_reached(paths: Iterable[str], do: Callable[[str], str]) -> str:
    """Return what `do` reaches by the first of these that leads anywhere."""
    return next(filter(None, (reached_by(do, path) for path in paths)), "")


def reached_by(do: Callable[[str], str], path: str) -> str:
    """Return what `do` reaches by this path, or nothing where it is refused."""
    try:
        return do(path)
    except (OSError, ValueError):
        return ""


def syscall(number: int, *arguments: Any) -> int:
    """Call the kernel by number, as on x86-64; raises `OSError`."""
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "these numbers are those of x86-64")
    result: int = LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def others(targets: dict[str, Any]) -> list[int]:
    """Return the daemon, and behind the wall whatever else there is: outside that is the whole machine."""
    pids = [int(targets["daemon_pid"])]
    if targets["walled"]:
        pids += [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if pid not in {os.getpid(), os.getppid()}]


def leads_to_python(path: str) -> bool:
    """Whether the interpreter lies below: behind the wall such a directory is there, and empty else."""
    prefixes = (sys.prefix, sys.base_prefix, *sys.path)
    return any(Path(prefix).is_relative_to(path) for prefix in prefixes)


def written(path: str) -> str:
    """Write a new file in a directory, or open a file for writing."""
    if Path(path).is_dir():
        path = f"{path}/written"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return path
