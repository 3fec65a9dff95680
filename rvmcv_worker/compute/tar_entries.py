"""The entries of a tar, plain or compressed, read strictly forward."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from rvmcv_worker.compute.entry import CHUNK_BYTES, Entry
from rvmcv_worker.compute.entry_names import refusal
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.errors import DatasetInvalidError

#: Longest stretch that `tarfile` may want at once; only a header that lies about its size wants more.
_MAX_READ_BYTES = 1024 * 1024

_KINDS = {
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.LNKTYPE: "is a hard link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a named pipe",
}


def _open(path: Path, compression: str) -> IO[bytes]:
    if compression == "gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if compression == "bz2":
        return cast("IO[bytes]", bz2.open(path, "rb"))
    if compression == "xz":
        return cast("IO[bytes]", lzma.open(path, "rb"))
    return path.open("rb")


class _ForwardReader:
    """What `tarfile` reads from: it never goes back, and each unpacked byte, kept or skipped, is counted.

    `count(n)` is called before n more bytes are handed out and raises when they are too many.
    """

    def __init__(self, stream: IO[bytes], count: Callable[[int], None]) -> None:
        self._stream = stream
        self._count = count
        self._position = 0
        #: What the last read returned: the header block that ended the archive, when it has ended.
        self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._stream.read(size)
        self._position += len(self.last)
        self._count(len(self.last))
        return self.last

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("an entry that lies before the one it follows")
        while self._position < position:
            if not self.read(min(position - self._position, CHUNK_BYTES)):
                raise tarfile.ReadError("unexpected end of data")


def tar_entries(path: Path, compression: str, count: Callable[[int], None]) -> Iterator[Entry]:
    """Yield each entry of the tar at `path`; `compression` is tar, gz, bz2 or xz.

    Raises `DatasetInvalidError` at the first link, device, pipe or sparse file, and at the end of an archive
    that stops without saying that it is complete.
    """
    with _open(path, compression) as stream:
        reader = _ForwardReader(stream, count)
        last = "its beginning"
        with tarfile.open(fileobj=cast("IO[bytes]", reader), mode="r:") as archive:
            while (member := archive.next()) is not None:
                cast("Any", archive).members.clear()  # it would keep every header until the end
                _check(member)
                last = member.name
                yield Entry(member.name, member.isdir(), member.size, partial(_chunks, reader, member))
        # `tarfile` takes a damaged header for the end; only a block of zeros is one.
        if reader.last != bytes(tarfile.BLOCKSIZE):
            raise DatasetInvalidError(
                f"the archive is cut off or damaged after '{printable(last)}'; pack or upload it again"
            )
        while reader.read(CHUNK_BYTES):  # the compressor's own checksum stands at the very end
            pass


def _check(member: tarfile.TarInfo) -> None:
    if member.type in _KINDS:
        raise refusal(member.name, _KINDS[member.type])
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise refusal(member.name, "is neither a plain file nor a folder")


def _chunks(reader: _ForwardReader, member: tarfile.TarInfo) -> Iterator[bytes]:
    reader.seek(member.offset_data)
    left = member.size
    while left:
        chunk = reader.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise tarfile.ReadError("unexpected end of data")
        left -= len(chunk)
        yield chunk
