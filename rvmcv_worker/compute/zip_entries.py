"""The entries of a .zip, read without believing what its headers say."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from rvmcv_worker.compute.entry import CHUNK_BYTES, Entry
from rvmcv_worker.compute.entry_names import refusal
from rvmcv_worker.errors import DatasetInvalidError

_CENTRAL_SIGNATURE = b"PK\x01\x02"
#: Longest stretch of the central directory that one honest entry takes: its header, name and extra field.
_MAX_CENTRAL_BYTES_PER_ENTRY = 2048
#: The fixed part of a local header, which stands before each entry's data.
_LOCAL_HEADER_BYTES = 30
#: Encrypted, strongly encrypted, or with a masked header.
_ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000


class _DirectoryGuard(io.FileIO):
    """A file that counts the entries of a central directory before `zipfile` makes an object of each."""

    def __init__(self, path: Path, max_entries: int) -> None:
        super().__init__(path, "rb")
        self._max_entries: int | None = max_entries

    def disarm(self) -> None:
        """Stop counting: the directory has been read."""
        self._max_entries = None

    def read(self, size: int | None = -1, /) -> bytes:
        size = -1 if size is None else size
        if self._max_entries is not None:
            wanted = size if size >= 0 else os.fstat(self.fileno()).st_size - self.tell()
            if wanted > self._max_entries * _MAX_CENTRAL_BYTES_PER_ENTRY + CHUNK_BYTES:
                raise _too_many(self._max_entries)
        data = super().read(size) or b""
        if self._max_entries is not None and data.count(_CENTRAL_SIGNATURE) > self._max_entries:
            raise _too_many(self._max_entries)
        return data


def _too_many(max_entries: int) -> DatasetInvalidError:
    return DatasetInvalidError(f"the archive has more than {max_entries} entries, which is the limit")


@contextmanager
def zip_entries(path: Path, max_entries: int) -> Iterator[list[Entry]]:
    """Open the zip at `path` and yield its entries, which can be read until the context ends.

    Raises `DatasetInvalidError` when any is a link, a device, encrypted, packed by a method other than store
    and deflate, or shares its bytes with another (which is how a zip of 42 kB unpacks to petabytes).
    """
    with _DirectoryGuard(path, max_entries) as file, zipfile.ZipFile(file) as archive:
        file.disarm()
        infos = archive.infolist()
        for info in infos:
            _check(info)
        _check_overlap(infos, archive.start_dir)
        yield [
            Entry(info.orig_filename, info.is_dir(), info.file_size, partial(_chunks, archive, info))
            for info in infos
        ]


def _check(info: zipfile.ZipInfo) -> None:
    if not info.filename:  # or one that begins with NUL, where `zipfile` ends it
        raise refusal(info.orig_filename, "has no name")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
        raise refusal(info.orig_filename, "is a link, a pipe or a device")
    if info.flag_bits & _ENCRYPTED_FLAGS:
        raise refusal(info.orig_filename, "is encrypted, and the worker has no password")
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise refusal(
            info.orig_filename,
            f"is compressed by method {info.compress_type}, only 0 (store) and 8 (deflate) are read",
        )


def _check_overlap(infos: list[zipfile.ZipInfo], directory_offset: int) -> None:
    ordered = sorted(infos, key=lambda info: info.header_offset)
    ends = [info.header_offset for info in ordered[1:]] + [directory_offset]
    for info, end in zip(ordered, ends, strict=False):
        if info.header_offset + _LOCAL_HEADER_BYTES + info.compress_size > end:
            raise refusal(info.orig_filename, "overlaps another entry")


def _chunks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    stream: IO[bytes]
    with archive.open(info) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
