"""What a child prints: harmless text, line by line, cut at a cap, its last lines at hand."""

from __future__ import annotations

import collections
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from rvmcv_worker.logs import escape, redact

#: Lines kept for error messages and the result.
TAIL_LINES = 200
#: Longest line that is kept whole, in characters.
MAX_LINE = 4000

#: Colours and cursor movements of terminals: dropped, not shown.
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_FLOOD_TAIL_BYTES = 64 * 1024


def harmless(text: str, max_length: int = MAX_LINE) -> str:
    """Return one line of untrusted text for log, terminal or page: what does not print is escaped.

    That takes the teeth out of terminal codes, forged log lines and text that runs right to left.
    """
    if len(text) > max_length:
        text = text[:max_length] + " … (cut)"
    return escape(_TERMINAL.sub("", text).replace("\t", "    "))


def harmless_text(text: str, max_length: int = MAX_LINE) -> str:
    """Return `harmless` lines of a text that may have several, at most `max_length` characters in all."""
    return "\n".join(harmless(line, max_length) for line in text[:max_length].splitlines())


class ChildLog:
    """A child's output as it comes; `file` holds it, up to `max_bytes`, and then the last lines.

    What an earlier child of the same name has written stays before it.

    `each` is called with each line until the cap. Beyond it nothing is looked at but the end.
    """

    def __init__(self, file: Path, max_bytes: int, each: Callable[[str], None] | None = None) -> None:
        self._file: BinaryIO = file.open("ab", buffering=0)
        self._left_bytes = max_bytes - self._file.tell()
        self._max_bytes = max_bytes
        self._each = each
        self._part = b""
        self._lines: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._flood = b""
        self._closed = False

    @property
    def is_full(self) -> bool:
        """Whether the cap is reached: the reader may then take its time."""
        return self._left_bytes <= 0

    @property
    def tail(self) -> str:
        """The last lines, up to `TAIL_LINES`."""
        return "\n".join(self._lines)

    def feed(self, data: bytes) -> None:
        """Take in what the child wrote."""
        if self.is_full:
            self._flood = (self._flood + data)[-_FLOOD_TAIL_BYTES:]
            return
        *lines, self._part = (self._part + data).split(b"\n")
        if len(self._part) > MAX_LINE * 4:  # a line without an end: show it in pieces
            lines.append(self._part)
            self._part = b""
        self._write([_shown(line) for line in lines])

    def close(self) -> None:
        """Write what is left; `tail` is final from here on."""
        if self._closed:
            return
        self._closed = True
        if self._part:
            self._write([_shown(self._part)])
        if self._flood:
            lines = self._flood.removesuffix(b"\n").split(b"\n")
            if len(self._flood) == _FLOOD_TAIL_BYTES:
                del lines[0]  # it starts in the middle
            self._lines.extend(map(_shown, lines))
            self._append(("\n".join(["… the last lines:", *self._lines]) + "\n").encode())
        self._file.close()

    def _write(self, lines: list[str]) -> None:
        if not lines:
            return
        self._lines.extend(lines)
        if self._each:
            for line in lines:
                self._each(line)
        text = ("\n".join(lines) + "\n").encode()
        self._append(text[: self._left_bytes])
        self._left_bytes -= len(text)
        if self.is_full:
            self._append(f"\n… cut: the job wrote more than {self._max_bytes / 1e6:g} MB of log\n".encode())
            self._flood = self._part
            self._part = b""

    def _append(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk costs the log, not the job
            self._file.write(data)


def _shown(line: bytes) -> str:
    # A progress bar redraws its line after each carriage return; the last state is what one would see.
    # Behind the wall a child knows no secret; without one it may have found some, and its log is published.
    return redact(harmless(line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")))
