"""Weights by sha256 on disk: a cache, never a source of truth."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from rvmcv_worker.config import ModelSettings
from rvmcv_worker.errors import ChecksumMismatchError, InvalidJobError, ModelUnavailableError
from rvmcv_worker.events import Event, event
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.partial_file import new_file
from rvmcv_worker.storage import Storage

_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Directory of what was made of the weights, each entry named ``<sha256 of the weights>-…``.
EXPORTS = "exports"
_CHUNK_BYTES = 1024 * 1024
#: An unfinished file this old was left by a daemon that was killed.
_STALE_S = 24 * 3600.0

#: Device, inode, size, times of modification and of change.
_Identity = tuple[int, int, int, int, int]


class ModelStore:
    """A directory of weights, each file named by its sha256 and read-only; safe for several threads.

    A file is never linked into a workspace but copied, and hashed while it is: what lies here stays
    out of reach of jobs, and what a job gets has the hash that it asked for. What is asked for by a name
    that is pinned is what it is pinned to, whatever RVM-Server or an earlier day took it for.
    """

    def __init__(
        self,
        directory: Path,
        limit_bytes: int,
        *,
        pins: ModelSettings | None = None,
        walled: bool = True,
    ) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._pins = pins
        #: Whether no job's process can reach the files; else each use hashes them again.
        self._walled = walled
        self._names = directory / "names.json"
        #: How each file was when this daemon hashed it last and found what its name says.
        self._verified: dict[str, _Identity] = {}
        self._verifying = threading.Lock()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)

    def get(self, sha256: str) -> Path | None:
        """The file of that hash; None when there is none or it was corrupted.

        It is hashed, unless the file is the very one, untouched since, that this daemon has hashed before.
        What a disk does to it unasked, `place` finds. Without a wall it is hashed each time: a process that
        holds the file mapped can change it and leave its times as they were.
        """
        path = self._path(sha256)
        try:
            with path.open("rb") as file:
                if not (self._walled and self._is_verified(sha256, file)):
                    before = _identity(file)
                    if (found := _hash(file)) != sha256:
                        path.unlink(missing_ok=True)
                        event(Event.STORE_DAMAGED).warning(
                            "model store: {} had the bytes of {}: removed, it will be fetched again; nothing "
                            "to do unless this goes on, then see to the disk",
                            path,
                            found,
                        )
                        return None
                    self._note_verified(sha256, file, before)
        except FileNotFoundError:
            return None
        return path

    def _is_verified(self, sha256: str, file: BinaryIO) -> bool:
        """Whether the file is the one that was hashed before; if so it counts as used now."""
        with self._verifying:
            if known := self._verified.get(sha256) == _identity(file):
                self._mark_used(sha256, file)
            return known

    def _note_verified(self, sha256: str, file: BinaryIO, before: _Identity) -> None:
        with self._verifying:
            if _identity(file) == before:  # else it was touched meanwhile, and is hashed again the next time
                self._mark_used(sha256, file)

    def _mark_used(self, sha256: str, file: BinaryIO) -> None:
        os.utime(file.fileno())  # the time of its last use, which `trim` goes by
        self._verified[sha256] = _identity(file)

    def add(self, file: Path, *, name: str | None = None) -> str:
        """Take a copy of a file, under `name` for when RVM-Server does not know that; returns its sha256."""
        part = self._part()
        try:
            with file.open("rb") as source, new_file(part) as target:
                sha256 = copy_hashed(source, target)
            self._take_in(part, sha256)
        finally:
            part.unlink(missing_ok=True)
        if name:
            self._write_names({**self._read_names(), name: sha256})
        return sha256

    def fetch_base_model(
        self,
        wanted: str,
        *,
        expected_sha256: str | None,
        storage: Storage,
        max_bytes: int,
        interrupt: Interrupt,
    ) -> str:
        """Have the model of that name, version or sha256 in the store; returns its sha256.

        Only RVM-Server and this store are asked, never the internet. For a name RVM-Server says each
        time which bytes it stands for now; a hash that was asked for is that hash or an error.
        Raises `ModelUnavailableError`, `ModelInvalidError` (too large), `ChecksumMismatchError`.
        """
        pinned = self._pins.sha256_of(wanted) if self._pins else None
        expected = _expected(wanted, expected_sha256, pinned)
        promised = expected or storage.promised_model_sha256(wanted)
        if promised and self.get(promised):
            return promised
        part = self._part()
        try:
            fetched = storage.fetch_model(
                wanted, part, max_bytes=max_bytes, sha256=expected, interrupt=interrupt
            )
            self._take_in(part, fetched.sha256)
        except ChecksumMismatchError as error:
            if pinned is None:
                raise
            raise ChecksumMismatchError(
                f"{error.message}: [models.pinned] names it; {_to_unpin(wanted)}"
            ) from None
        except ModelUnavailableError:
            named = self._read_names().get(wanted)
            if named is not None and pinned not in (None, named):
                raise ChecksumMismatchError(
                    f"the worker's store has {named} as {wanted}, but [models.pinned] says {pinned}; "
                    + _to_unpin(wanted)
                ) from None
            if named is None or expected not in (None, named) or self.get(named) is None:
                raise
            event(Event.MODEL_FROM_STORE).warning(
                "model {}: not to be had from RVM-Server, taken from the store ({}); nothing to do",
                wanted,
                named,
            )
            return named
        finally:
            part.unlink(missing_ok=True)
        self.trim(keep={fetched.sha256})
        return fetched.sha256

    def place(self, sha256: str, dest: Path) -> None:
        """Copy the model to `dest` (new, mode 0600).

        Raises `ModelUnavailableError`, `ChecksumMismatchError`.
        """
        path = self._path(sha256)
        try:
            source = path.open("rb")
        except FileNotFoundError:
            raise ModelUnavailableError(
                f"the model {sha256} is no longer in the worker's store; try again"
            ) from None
        with source, new_file(dest) as target:
            found = copy_hashed(source, target)
        if found != sha256:
            dest.unlink()
            path.unlink(missing_ok=True)
            raise ChecksumMismatchError(
                f"the worker's copy of the model {sha256} had become {found}; it was removed,"
                " and is fetched again by the next job"
            )

    def trim(self, *, keep: Collection[str] = (), limit_bytes: int | None = None) -> list[str]:
        """Remove the least recently used until the limit is kept, but the last used; returns what went.

        What was exported of weights counts with them, and goes with them.
        """
        limit_bytes = self._limit_bytes if limit_bytes is None else limit_bytes
        self._remove_stale()
        held = []
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _SHA256.fullmatch(path.name):
                    size_bytes = path.stat().st_size + self._exported_bytes(path.name)
                    held.append((path.stat().st_mtime_ns, size_bytes, path))
        held.sort()
        total_bytes = sum(size_bytes for _, size_bytes, _ in held)
        removed = []
        for _, size_bytes, path in held[:-1]:
            if total_bytes <= limit_bytes:
                break
            if path.name in keep:
                continue
            path.unlink(missing_ok=True)
            total_bytes -= size_bytes
            removed.append(path.name)
        self._remove_orphans()
        if removed:
            event(Event.STORE_TRIMMED).info(
                "model store: {} models removed, the limit is {} bytes", len(removed), limit_bytes
            )
        return removed

    def empty(self, *, spared_s: float) -> int:
        """Remove all that was not used within so many seconds, exports too; returns how many models went.

        The names that models were added under go with the last of them.
        """
        self._remove_stale()
        removed = kept = 0
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if not _SHA256.fullmatch(path.name):
                    continue
                if time.time() - path.stat().st_mtime < spared_s:
                    kept += 1
                else:
                    path.unlink()
                    removed += 1
        if not kept:
            self._names.unlink(missing_ok=True)
        self._remove_orphans()
        return removed

    def _remove_orphans(self) -> None:
        """Remove what was exported of weights that are gone."""
        for directory in (self._directory / EXPORTS).glob("[0-9a-f]*-*"):
            if not (self._directory / directory.name.partition("-")[0]).exists():
                shutil.rmtree(directory, ignore_errors=True)

    def used_bytes(self) -> int:
        """What the weights and what was exported of them take."""
        total_bytes = 0
        for file in (*self._directory.iterdir(), *(self._directory / EXPORTS).glob("*/*")):
            with contextlib.suppress(FileNotFoundError):
                total_bytes += file.stat().st_size if file.is_file() else 0
        return total_bytes

    def _exported_bytes(self, sha256: str) -> int:
        total_bytes = 0
        for file in (self._directory / EXPORTS).glob(f"{sha256}-*/*"):
            with contextlib.suppress(FileNotFoundError):
                total_bytes += file.stat().st_size
        return total_bytes

    def _path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise ValueError("not a sha256 in lower case")
        return self._directory / sha256

    def _part(self) -> Path:
        return self._directory / f".part-{secrets.token_hex(8)}"

    def _take_in(self, part: Path, sha256: str) -> None:
        """Give a whole file its name; after a power cut it is there whole or not at all."""
        part.chmod(0o400)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(self._path(sha256))
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _remove_stale(self) -> None:
        for path in self._directory.glob(".part-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()

    def _read_names(self) -> dict[str, str]:
        try:
            found = json.loads(self._names.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            event(Event.STORE_DAMAGED).warning(
                "model store: {} cannot be read: its names are forgotten; nothing to do", self._names
            )
            return {}
        pairs = found.items() if isinstance(found, dict) else ()
        return {
            name: sha256 for name, sha256 in pairs if isinstance(sha256, str) and _SHA256.fullmatch(sha256)
        }

    def _write_names(self, names: dict[str, str]) -> None:
        part = self._part()
        with new_file(part) as file:
            file.write(json.dumps(names, indent=1, sort_keys=True).encode())
        part.rename(self._names)


def _expected(wanted: str, expected_sha256: str | None, pinned: str | None) -> str | None:
    expected = expected_sha256.lower() if expected_sha256 else None
    by_hash = wanted.lower() if _SHA256.fullmatch(wanted.lower()) else None
    if by_hash and expected not in (None, by_hash):
        raise InvalidJobError(
            f"the model is asked for as {by_hash} and as {expected}; leave one of the two out"
        )
    if pinned and expected not in (None, pinned):
        raise ChecksumMismatchError(
            f"the job wants {wanted} to be {expected}, but the worker's [models.pinned] says that it is"
            f" {pinned}; {_to_unpin(wanted)}"
        )
    return expected or by_hash or pinned


def _to_unpin(wanted: str) -> str:
    return (
        "upload another model under a name of its own, or, where yours is another on purpose, pin its sha256"
        f" ({json.dumps(wanted)} there)"
    )


def copy_hashed(source: BinaryIO, target: BinaryIO) -> str:
    """Copy to the end; returns the sha256 of what was copied."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def _hash(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _identity(file: BinaryIO) -> _Identity:
    info = os.fstat(file.fileno())
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
