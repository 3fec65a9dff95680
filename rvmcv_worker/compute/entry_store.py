"""Arrays of one size, kept in memory or in a file, written once and read in any order."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Entry = NDArray[np.float16]


class EntryStore(Protocol):
    """Numbers its entries as they come, from 0."""

    def append(self, entry: Entry) -> None:
        """Keep a flat array; raises `OSError` where there is no room, and is then as it was before."""

    def truncate(self, count: int) -> None:
        """Forget all entries from number `count` on, while none of them is in use."""

    def expect(self, numbers: list[int]) -> None:
        """Hear which entries are read next, to bring them near meanwhile."""

    def read(self, number: int) -> Entry:
        """Return an entry; it must not be changed, nor be held for long."""

    def close(self) -> None:
        """Forget all entries."""


class MemoryStore:
    """Keeps its entries in this process's memory."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def append(self, entry: Entry) -> None:
        """Keep a copy of its own."""
        kept = entry.copy()
        kept.flags.writeable = False
        self._entries.append(kept)

    def truncate(self, count: int) -> None:
        """Give their memory back."""
        del self._entries[count:]

    def expect(self, numbers: list[int]) -> None:
        """Nothing is nearer than memory."""

    def read(self, number: int) -> Entry:
        """Return the entry itself."""
        return self._entries[number]

    def close(self) -> None:
        """Give the memory back."""
        self._entries.clear()


class FileStore:
    """Keeps its entries in one file, mapped for reading, which goes with `close`.

    What is read of it lies in the page cache as long as there is memory for that, and is not this process's.
    """

    def __init__(self, path: Path, entry_size: int) -> None:
        """`entry_size`: numbers in an entry."""
        self._path = path
        self._entry_bytes = entry_size * np.dtype(np.float16).itemsize
        self._count = 0
        self._file = path.open("w+b", buffering=0)
        self._map: mmap.mmap | None = None

    def append(self, entry: Entry) -> None:
        """Write it; not through the map, where a full disk is a signal that ends the process."""
        rest, offset = entry.view(np.uint8).data, self._count * self._entry_bytes
        try:
            while rest:
                written = os.pwrite(self._file.fileno(), rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError:
            self.truncate(self._count)
            raise
        self._count += 1
        self._map = None  # it ends before this entry

    def truncate(self, count: int) -> None:
        """Give their room on the disk back."""
        self._map = None  # to read it beyond the file's end would end the process
        os.ftruncate(self._file.fileno(), count * self._entry_bytes)
        self._count = count

    def expect(self, numbers: list[int]) -> None:
        """Have the kernel read whole entries at once; page faults would ask for them bit by bit."""
        for number in numbers:
            # The kernel wants the beginning of a page.
            start = number * self._entry_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            end = (number + 1) * self._entry_bytes
            self._mapped().madvise(mmap.MADV_WILLNEED, start, end - start)

    def read(self, number: int) -> Entry:
        """Return a view of the map."""
        size = self._entry_bytes // 2
        return np.frombuffer(self._mapped(), np.float16, size, number * self._entry_bytes)

    def close(self) -> None:
        """Remove the file."""
        self._map = None
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map
