"""A journal that takes events, as journald does: by a datagram socket, and by sealed files."""

from __future__ import annotations

import array
import contextlib
import io
import os
import socket
import struct
import sys
from pathlib import Path

import pytest

from rvmcv_worker import journal


class JournalSocket:
    """A context manager; `entries` are what has come so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def __enter__(self) -> JournalSocket:
        self._socket.bind(str(self.path))
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        self._socket.close()

    def entries(self) -> list[dict[str, str]]:
        """Return what waits, field by field; journald takes a file only where nobody can change it."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                datagram, control, _, _ = self._socket.recvmsg(2**20, 100)
                for _, _, raw in control:
                    (descriptor,) = array.array("i", raw)
                    datagram = _sealed(descriptor)
                found.append(_fields(datagram))
        return found


def _sealed(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        with pytest.raises(OSError, match="not permitted"):
            file.truncate(0)
        file.seek(0)
        return file.read()


def _fields(datagram: bytes) -> dict[str, str]:
    fields = {}
    while datagram:
        name, _, rest = datagram.partition(b"\n")
        (length,) = struct.unpack_from("<Q", rest)
        assert rest[8 + length : 9 + length] == b"\n"
        fields[name.decode()] = rest[8 : 8 + length].decode()
        datagram = rest[9 + length :]
    return fields


def under_systemd(monkeypatch: pytest.MonkeyPatch, directory: Path, path: Path) -> io.TextIOWrapper:
    """Have this process believe that systemd started it; returns the standard error that is its own."""
    stream = (directory / "stderr").open("w+", encoding="utf-8", errors="backslashreplace")
    found = os.fstat(stream.fileno())
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    monkeypatch.setattr(journal, "SOCKET", path)
    return stream
