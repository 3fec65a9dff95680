"""journald's own protocol: an event with its fields is one datagram (systemd.io/JOURNAL_NATIVE_PROTOCOL).

By standard error a line has no fields by which to look for a job, and ends at 48 kB.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")
#: How long a journal that takes nothing is waited for, and how long it is then left alone, in seconds: the
#: main loop logs too, and has a watchdog.
_PATIENCE_S, _REST_S = 0.5, 5.0
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def has_stderr() -> bool:
    """Whether standard error goes to the journal, of which systemd tells device and inode.

    The variable alone says little: whatever is started from a service inherits it.
    """
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class Journal:
    """The way to journald; whoever uses it takes turns."""

    def __init__(self) -> None:
        self._path = SOCKET
        self._socket: socket.socket | None = None
        self._again_s = 0.0

    def send(self, fields: Mapping[str, str]) -> bool:
        """Send one event; False where the journal does not take it, which is for standard error then."""
        if time.monotonic() < self._again_s:
            return False
        datagram = b"".join(_field(name, value) for name, value in fields.items())
        try:
            try:
                self._send(datagram)
            except ConnectionError:  # the socket was made anew; a restart of journald alone keeps it
                self.close()
                self._send(datagram)
        except OSError:
            self.close()
            self._again_s = time.monotonic() + _REST_S
            return False
        return True

    def close(self) -> None:
        """Let go of the socket; the next event opens it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, datagram: bytes) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.settimeout(_PATIENCE_S)
            self._socket.connect(str(self._path))
        try:
            self._socket.send(datagram)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            self._send_as_file(self._socket, datagram)

    @staticmethod
    def _send_as_file(to: socket.socket, datagram: bytes) -> None:
        descriptor = os.memfd_create("rvmcv-worker-event", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            file.write(datagram)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)  # journald reads no file that may change
            socket.send_fds(to, [b""], [descriptor])


def _field(name: str, value: str) -> bytes:
    """Return a field in the form that allows any value, line breaks too."""
    raw = value.encode("utf-8", "backslashreplace")
    return name.encode() + b"\n" + struct.pack("<Q", len(raw)) + raw + b"\n"
