"""The lock of the state directory: one process at a time changes what lies there."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from rvmcv_worker.config import ConfigError


class AlreadyRunningError(Exception):
    """Another process works on this state directory."""


def take(state_dir: Path) -> int:
    """Take the state directory for this process; the lock goes with the descriptor, or with the process.

    Raises `AlreadyRunningError`, or `ConfigError` where nothing can be written.
    """
    try:
        descriptor = os.open(state_dir / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"[worker] state_dir: {state_dir} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunningError(f"another rvmcv-worker works on {state_dir}: stop it first") from None
    return descriptor


def is_held(state_dir: Path) -> bool:
    """Whether a process works on the state directory; nothing is written to find that out."""
    try:
        descriptor = os.open(state_dir / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
