"""Gives a running worker a new token: `systemctl reload`.

systemd reads what LoadCredential= names at a start and never again, from a directory that only root reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from rvmcv_worker import owner, secret_file
from rvmcv_worker.config import CREDENTIAL_FILES, HANDED_OVER
from rvmcv_worker.secret_file import SecretFileError

_TOKEN = CREDENTIAL_FILES["token"]
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class HandoverError(Exception):
    """The token was not handed over, and the worker was told nothing: it goes on with the one it has."""


def hand_over(source: Path, runtime_dir: Path, pid: int) -> None:
    """Put the token that lies in `source` where the daemon `pid` looks first, and have it read again.

    Called as root; only the reading of `source` is done as root. Raises `HandoverError`.
    """
    try:
        token = secret_file.read(source)
    except SecretFileError as error:
        raise HandoverError(f"{error}; then reload again") from None
    if token is None:
        raise HandoverError(
            f"{source}: no such file: write the new token into it (mode 0600), then reload again"
        )
    try:
        owner.become(runtime_dir)
        _write(runtime_dir, token)
    except OSError as error:
        where = runtime_dir / HANDED_OVER / _TOKEN
        raise HandoverError(
            f"{where} cannot be written: {error.strerror}; restart the worker instead"
        ) from None
    try:
        os.kill(pid, signal.SIGHUP)
    except OSError as error:
        raise HandoverError(f"process {pid} cannot be told: {error.strerror}; restart the worker") from None


def _write(runtime_dir: Path, token: str) -> None:
    """Put the new token in the old one's place; a reader finds the one or the other."""
    with contextlib.ExitStack() as stack:
        runtime = os.open(runtime_dir, _DIRECTORY)
        stack.callback(os.close, runtime)
        with contextlib.suppress(FileExistsError):
            os.mkdir(HANDED_OVER, 0o700, dir_fd=runtime)
        directory = os.open(HANDED_OVER, _DIRECTORY, dir_fd=runtime)
        stack.callback(os.close, directory)
        part = f".{_TOKEN}.part"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=directory)
        new = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
        with os.fdopen(new, "w") as file:
            file.write(f"{token}\n")
        os.rename(part, _TOKEN, src_dir_fd=directory, dst_dir_fd=directory)
