"""Calls of the kernel that the standard library lacks; imports nothing else of this package."""

from __future__ import annotations

import ctypes
import os
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# linux/prctl.h, linux/seccomp.h
_SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS, _MODE_FILTER = 4, 22, 38, 2


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def call(number: int, *arguments: Any) -> int:
    """Make a system call that has the same number on each processor; raises `OSError`."""
    answer = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return answer


def word(value: int | None) -> Any:
    """Return an argument of a call as the kernel takes it, with its full width; None is no address."""
    return ctypes.c_void_p(None) if value is None else ctypes.c_long(value)


def forbid_new_privileges() -> None:
    """Let no program that this process turns into have more rights than it: no setuid, no capabilities."""
    _prctl(_SET_NO_NEW_PRIVS, 1)


def filter_calls(program: bytes) -> None:
    """Put a seccomp filter on this process and all that it becomes or starts."""
    instructions = ctypes.c_char_p(program)
    _prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(_Program(len(program) // 8, instructions)))


def hide_memory() -> None:
    """Keep other processes of this user from this one's memory, environment and descriptors.

    It also leaves no core dump. Children are as before: `exec` takes it back.
    """
    _prctl(_SET_DUMPABLE, 0)


def _prctl(option: int, value: int, argument: Any = 0) -> None:
    zero = ctypes.c_ulong(0)
    if isinstance(argument, int):
        argument = ctypes.c_ulong(argument)
    if _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), argument, zero, zero) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
