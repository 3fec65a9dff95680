"""A file on its way out: its next part is read and hashed while the last one travels."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO

from rvmcv_worker.interrupt import Interrupt


class ReadAhead:
    """Reads `size_bytes` of a file once, in parts; a context manager. It holds two parts in memory."""

    def __init__(self, source: BinaryIO, size_bytes: int, part_bytes: int, interrupt: Interrupt) -> None:
        self._source = source
        self._left_bytes = size_bytes
        self._part_bytes = part_bytes
        self._interrupt = interrupt
        self._digest = hashlib.sha256()
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._next: Future[bytes] | None = None

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown()

    def read(self, size: int) -> bytes:
        """Return the next part, which must be asked for whole; raises what the interrupt asks for."""
        self._interrupt.check()
        wanted_bytes = min(self._part_bytes, self._left_bytes)
        if size != wanted_bytes:
            raise ValueError(f"{size} bytes were asked for, the next part has {wanted_bytes}")
        part = self._next.result() if self._next else self._read(wanted_bytes)
        self._left_bytes -= len(part)
        ahead_bytes = min(self._part_bytes, self._left_bytes)
        self._next = self._reader.submit(self._read, ahead_bytes) if ahead_bytes else None
        return part

    def sha256(self) -> str:
        """Return the hash of all that was read, once it has been read to its end."""
        if self._left_bytes:
            raise ValueError(f"{self._left_bytes} bytes were not read")
        return self._digest.hexdigest()

    def _read(self, size_bytes: int) -> bytes:
        part = self._source.read(size_bytes)
        self._digest.update(part)
        return part
