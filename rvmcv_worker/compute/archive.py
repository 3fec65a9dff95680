"""Unpack a data set's archive, which is taken for hostile, into an empty folder.

Of a .zip or .tar (.gz, .bz2, .xz) only images, label files and YAML are written, and JSON where it is wanted;
of a zip nothing before every name in it has been checked. Caches (`*.cache` and `*.npy` can be pickles) never
reach the disk.
"""

from __future__ import annotations

import errno
import os
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import Any

from rvmcv_worker.compute.entry import Entry
from rvmcv_worker.compute.entry_names import EntryNames, refusal
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.compute.tar_entries import tar_entries
from rvmcv_worker.compute.zip_entries import zip_entries
from rvmcv_worker.errors import DatasetInvalidError, DiskQuotaError

#: What Ultralytics takes for an image, by the name's ending in lower case.
IMAGE_SUFFIXES = frozenset(
    {
        ".avif",
        ".bmp",
        ".dng",
        ".heic",
        ".heif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".mpo",
        ".png",
        ".tif",
        ".tiff",
        ".webp",
    }
)
YAML_SUFFIXES = frozenset({".yaml", ".yml"})
_ARCHIVE_SUFFIXES = frozenset(
    {".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".7z", ".rar", ".zst"}
)

MAX_YAML_BYTES = 256 * 1024
#: The largest of COCO itself, of 118,000 images, has 469 MB.
MAX_JSON_BYTES = 512 * 1024 * 1024
#: Below this an archive may unpack to any multiple of its size: a few empty label files do.
_FREE_BYTES = 16 * 1024 * 1024

_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    LZMAError,
    struct.error,
    OSError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RecursionError,  # a tar of nothing but long-name headers
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a stranger's data is taken in."""

    max_unpacked_bytes: int
    max_entries: int
    #: Unpacked bytes per byte of the archive.
    max_ratio: float
    #: Width times height of one image.
    max_image_pixels: int

    @classmethod
    def from_job(cls, limits: dict[str, Any]) -> Limits:
        """Take the limits from the `limits` of a job."""
        return cls(
            max_unpacked_bytes=int(limits["max_unpacked_bytes"]),
            max_entries=int(limits["max_entries"]),
            max_ratio=float(limits["max_ratio"]),
            max_image_pixels=int(limits["max_image_pixels"]),
        )


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What an archive held."""

    #: Paths of the files on disk, relative to the target, as in the archive.
    files: tuple[str, ...]
    #: What was left in the archive: file ending (or kind of rubbish) -> count.
    skipped: dict[str, int]


class _Budget:
    """Counts unpacked bytes as they come, whatever the headers said."""

    def __init__(self, archive_bytes: int, limits: Limits) -> None:
        by_ratio = int(max(_FREE_BYTES, archive_bytes * limits.max_ratio))
        self.limit_bytes = min(limits.max_unpacked_bytes, by_ratio)
        self._why = (
            f"the limit of {limits.max_unpacked_bytes} bytes"
            if self.limit_bytes == limits.max_unpacked_bytes
            else f"{limits.max_ratio:g} times its own size, which no set of images does"
        )
        self.spent_bytes = 0

    def spend(self, size_bytes: int) -> None:
        self.spent_bytes += size_bytes
        if self.spent_bytes > self.limit_bytes:
            raise DatasetInvalidError(f"the archive unpacks to more than {self._why}")


def extract(
    path: Path, target: Path, limits: Limits, tick: Callable[[float], None], *, with_json: bool = False
) -> Unpacked:
    """Unpack the archive at `path` into the new folder `target`; .json only `with_json`.

    `tick(fraction)` is called for each entry and may raise to stop. Raises `DatasetInvalidError` for what is
    hostile, damaged or no archive, and `DiskQuotaError` when the disk is full.
    """
    kind = _kind(path)
    max_bytes = dict.fromkeys(YAML_SUFFIXES, MAX_YAML_BYTES) | (
        {".json": MAX_JSON_BYTES} if with_json else {}
    )

    def why_skipped(entry: Entry, name: str) -> str:
        return _why_skipped(entry, name, max_bytes)

    budget = _Budget(path.stat().st_size, limits)
    target.mkdir(mode=0o700)
    try:
        if kind != "zip":
            entries = _named(tar_entries(path, kind, budget.spend), limits.max_entries)
            return _write(entries, target, why_skipped, lambda _: None, lambda _: tick(0.0))
        with zip_entries(path, limits.max_entries) as listed:
            # All names are checked, and all claims added up, before the first byte is written.
            named = list(_named(listed, limits.max_entries))
            claimed_bytes = sum(entry.size_bytes for entry, name in named if not why_skipped(entry, name))
            if claimed_bytes > limits.max_unpacked_bytes:
                raise DatasetInvalidError(
                    f"the archive unpacks to more than the limit of {limits.max_unpacked_bytes} bytes"
                )
            return _write(
                named, target, why_skipped, budget.spend, lambda done: tick(done / max(1, len(named)))
            )
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise DiskQuotaError("the disk is full: the data set does not fit when unpacked") from error
        if isinstance(error, OSError) and error.errno not in {None, errno.EINVAL}:
            raise  # the machine's fault, not the archive's
        raise DatasetInvalidError(
            f"the archive is cut off or damaged ({printable(str(error))}); pack or upload it again"
        ) from error


def _kind(path: Path) -> str:
    """Return zip, tar, gz, bz2 or xz by the first bytes; the name says nothing that can be relied on."""
    with path.open("rb") as file:
        head = file.read(512)
    for magic, kind in ((b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"), (b"\x1f\x8b", "gz"), (b"BZh", "bz2")):
        if head.startswith(magic):
            return kind
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return "tar"
    what = "an unknown kind of file"
    if not head:
        what = "an empty file"
    elif head.lstrip()[:1] in {b"<", b"{"}:
        what = "a web page or an error message in place of the data set"
    elif head.startswith((b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")):
        what = "a 7z, RAR or Zstandard archive"
    raise DatasetInvalidError(f"the data set is {what}; a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz is needed")


def _is_old_tar(head: bytes) -> bool:
    """Whether this is a header of a tar from before `ustar`, which only its checksum tells."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _named(entries: Iterable[Entry], max_entries: int) -> Iterator[tuple[Entry, str]]:
    """Yield each entry with its checked path."""
    names = EntryNames()
    for index, entry in enumerate(entries):
        if index >= max_entries:
            raise DatasetInvalidError(f"the archive has more than {max_entries} entries, which is the limit")
        yield entry, names.add(entry.name, is_dir=entry.is_dir)


def _why_skipped(entry: Entry, name: str, max_bytes: Mapping[str, int]) -> str:
    """Return what kind of thing an entry is that is left in the archive, or "" for one that is wanted.

    `max_bytes` are the endings beside images and labels that are wanted, and how large these may be.
    """
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if entry.is_dir:
        return "folder"
    if "__MACOSX" in path.parts or any(part.startswith(".") for part in path.parts):
        return "hidden"  # Ultralytics does not see them either
    if suffix in IMAGE_SUFFIXES or suffix == ".txt":
        return ""
    if suffix in max_bytes:
        return "" if entry.size_bytes <= max_bytes[suffix] else f"{suffix} over {max_bytes[suffix]} bytes"
    return printable(suffix, 20) or "without ending"


def _write(
    named: Iterable[tuple[Entry, str]],
    target: Path,
    why_skipped: Callable[[Entry, str], str],
    spend: Callable[[int], None],
    tick: Callable[[int], None],
) -> Unpacked:
    files: list[str] = []
    skipped: Counter[str] = Counter()
    folders: set[str] = set()
    for done, (entry, name) in enumerate(named):
        tick(done)
        if why := why_skipped(entry, name):
            skipped[why] += 1
            continue
        folder, _, _ = name.rpartition("/")
        if folder not in folders:
            (target / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
            folders.add(folder)
        _write_file(entry, target / name, spend, lambda done=done: tick(done))  # type: ignore[misc]
        files.append(name)
    del skipped["folder"]
    endings = Counter(PurePosixPath(name).suffix.lower() for name in files)
    if not IMAGE_SUFFIXES & set(endings):
        _refuse_without_images(skipped + endings)
    return Unpacked(files=tuple(files), skipped=dict(skipped.most_common(30)))


def _write_file(entry: Entry, path: Path, spend: Callable[[int], None], tick: Callable[[], None]) -> None:
    written = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in entry.chunks():
            tick()
            written += len(chunk)
            if written > entry.size_bytes:
                break
            spend(len(chunk))
            file.write(chunk)
    if written != entry.size_bytes:
        raise refusal(entry.name, f"is not the {entry.size_bytes} bytes long that its header claims")


def _refuse_without_images(skipped: Counter[str]) -> None:
    archives = sum(count for suffix, count in skipped.items() if suffix in _ARCHIVE_SUFFIXES)
    if archives:
        raise DatasetInvalidError(
            f"the archive holds no image but {archives} other archive(s), which are not unpacked: "
            "unpack it once and pack the folder with the images itself"
        )
    found = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5)) or "nothing"
    raise DatasetInvalidError(
        f"the archive holds no image (found {found}); pack the folder with images and labels"
    )
