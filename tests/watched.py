"""A command at a terminal of its own: what it shows there, keys, and the size of the window."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time


class Watched:
    """A context manager; the command has the terminal as its controlling one, so that Ctrl-C reaches it."""

    def __init__(self, command: list[str], *, rows: int, columns: int) -> None:
        self._terminal, inner = pty.openpty()
        self.resize(rows=rows, columns=columns)
        self.seen = b""
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TERM": "xterm-256color"}
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=inner, stdout=inner, stderr=inner, env=environment
        )
        os.close(inner)
        self._from = 0

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)
        os.close(self._terminal)

    def resize(self, *, rows: int, columns: int) -> None:
        """Give the window another size, of which the kernel tells the command."""
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        """Type."""
        os.write(self._terminal, keys)

    def end(self) -> None:
        """Ask the command to end."""
        self._process.send_signal(signal.SIGTERM)

    def forget(self) -> None:
        """Have `wait_for` look at what comes from now on only."""
        self._from = len(self.seen)

    def wait_for(self, text: str, timeout_s: float = 20.0) -> None:
        """Wait until the text was shown."""
        deadline_s = time.monotonic() + timeout_s
        while text.encode() not in self._shown():
            assert self._read(deadline_s - time.monotonic()), f"{text!r} was not shown:\n{self._shown()!r}"

    def wait(self, timeout_s: float = 20.0) -> int:
        """Return the exit status, with all that was shown seen."""
        deadline_s = time.monotonic() + timeout_s
        while self._read(deadline_s - time.monotonic()):
            pass
        return self._process.wait(max(0.1, deadline_s - time.monotonic()))

    def _shown(self) -> bytes:
        """What came, without how it was drawn."""
        return re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", self.seen[self._from :])

    def _read(self, within_s: float) -> bool:
        """Take in what comes; False when nothing does, or nobody shows anything any more."""
        if not select.select([self._terminal], [], [], max(0.0, within_s))[0]:
            return False
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # the command has ended
            return False
        self.seen += data
        return bool(data)
