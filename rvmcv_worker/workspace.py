"""The directory of one attempt: make it, measure it, read back from it safely, wipe it whole.

    work/<job_id>-<attempt>/
      in/       what the daemon fetched
      <name>/   a child's own directory, one for each child
      out/      the daemon's frozen copies; no child ever sees it

A child may leave anything at all in its directory, so nothing here follows a link, trusts a mode or
recurses. Reading back and wiping are for after the child's tree is dead.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker import framing
from rvmcv_worker.errors import DiskQuotaError, JobCrashedError
from rvmcv_worker.events import Event, event

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: O_NONBLOCK: opening a FIFO that nobody writes to must not hang the daemon.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: How often `walk` tells how far it is.
_STEP_FILES = 200
#: `UsageMeter` rests so many times as long as it has counted.
_COUNT_SHARE = 50
#: Names in one directory that are looked at.
_MAX_LISTED = 10_000
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LeftBehindError(Exception):
    """The worker stops, and what the workspace holds is for its next start."""


@dataclass(frozen=True)
class Usage:
    """What a directory holds: bytes as allocated on the disk, and files of any kind."""

    bytes: int
    files: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.bytes + other.bytes, self.files + other.files)


@dataclass(frozen=True)
class Workspace:
    """The directory of one attempt, below `root`."""

    root: Path
    job_id: str
    attempt: int

    @property
    def in_dir(self) -> Path:
        """What the daemon fetched; children can only read it."""
        return self.root / "in"

    @property
    def out_dir(self) -> Path:
        """What the daemon froze and publishes from; children cannot see it."""
        return self.root / "out"

    def child_dir(self, name: str) -> Path:
        """Return the directory that the child `name` may write, made (0700) if it is not there."""
        if not _NAME.fullmatch(name) or name in {"in", "out"}:
            raise ValueError(f"not a name for a child's directory: {name!r}")
        directory = self.root / name
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory

    def write_job(self, child_name: str, job: dict[str, Any]) -> None:
        """Write the child's `job.json` and remove the `result.json` of an earlier run under this name."""
        self.child_dir(child_name)
        with self._opened(child_name) as directory:
            for name in ("job.json", "result.json"):
                try:
                    os.unlink(name, dir_fd=directory)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    raise JobCrashedError(f"{child_name}/{name} is in the way: {error.strerror}") from None
            fd = os.open("job.json", _NEW_FILE, 0o600, dir_fd=directory)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(framing.finite(job), file, allow_nan=False)

    def read_back(
        self, child_name: str, file_name: str, *, max_bytes: int, as_name: str | None = None
    ) -> Path | None:
        """Copy what a child wrote to `out/`, under `as_name` or its own last name; None when absent.

        An earlier copy of that name is replaced. Raises `JobCrashedError`, naming the file, for anything
        but a regular file with one link and at most `max_bytes`.
        """
        with self._opened_file(child_name, file_name, max_bytes) as source:
            if source is None:
                return None
            copy = self.out_dir / (as_name or file_name.rsplit("/", 1)[-1])
            part = self.out_dir / f".{copy.name}.part"
            part.unlink(missing_ok=True)
            before = os.fstat(source)
            with (
                open(source, "rb", closefd=False) as file,
                os.fdopen(os.open(part, _NEW_FILE, 0o600), "wb") as target,
            ):
                left = before.st_size
                while chunk := file.read(min(left, 1 << 20)):  # not to its end: a living child may append
                    target.write(chunk)
                    left -= len(chunk)
                copied = target.tell()
            if copied != before.st_size or _version(os.fstat(source)) != _version(before):
                part.unlink()
                raise JobCrashedError(f"{child_name}/{file_name} changed while it was read")
            return part.replace(copy)

    def child_files(self, child_name: str) -> list[str]:
        """Return the names in a child's directory, at most `_MAX_LISTED`; [] when it is not there."""
        try:
            with self._opened(child_name) as directory, os.scandir(directory) as entries:
                return [entry.name for entry in itertools.islice(entries, _MAX_LISTED)]
        except OSError:
            return []

    def read_result(self, child_name: str) -> dict[str, Any] | None:
        """Return the child's `result.json`, or None when there is none; raises `JobCrashedError`."""
        with self._opened_file(child_name, "result.json", framing.MAX_RESULT_BYTES) as source:
            if source is None:
                return None
            with open(source, "rb", closefd=False) as file:
                text = file.read(framing.MAX_RESULT_BYTES + 1)
        try:
            return framing.parse_object(text)
        except framing.FramingError as error:
            raise JobCrashedError(f"{child_name}/result.json: {error}") from None

    @contextlib.contextmanager
    def _opened(self, *parts: str) -> Iterator[int]:
        """Open a directory beneath the root, no component of which may be a link."""
        fd = os.open(self.root, _DIRECTORY)
        try:
            for part in parts:
                below = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _opened_file(self, child_name: str, file_name: str, max_bytes: int) -> Iterator[int | None]:
        """Open a file that a child wrote, checked as `read_back` says; None when it is absent."""
        shown = f"{child_name}/{file_name}"
        parts = file_name.split("/")
        if any(part in {"", ".", ".."} or "\0" in part for part in parts):
            raise JobCrashedError(f"not a path to read back: {shown!r}")
        try:
            with self._opened(child_name, *parts[:-1]) as directory:
                fd = os.open(parts[-1], _FILE, dir_fd=directory)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            what = {errno.ELOOP: "a link", errno.ENOTDIR: "a link or a file where a directory belongs"}
            reason = what.get(error.errno or 0, error.strerror)
            raise JobCrashedError(f"{shown} is not a regular file of the job's own: {reason}") from None
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise JobCrashedError(f"{shown} is not a regular file")
            if info.st_nlink != 1:
                raise JobCrashedError(f"{shown} is a hard link to another file")
            if info.st_size > max_bytes:
                raise JobCrashedError(f"{shown} has {info.st_size} bytes; at most {max_bytes} are read")
            yield fd
        finally:
            os.close(fd)


def _version(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


@contextlib.contextmanager
def make(work_dir: Path, job_id: str, attempt: int) -> Iterator[Workspace]:
    """Make the workspace of an attempt and wipe it at the end, however the end comes.

    Only `LeftBehindError` leaves it, for the next start of the daemon.
    """
    if not _NAME.fullmatch(job_id):
        raise ValueError(f"not a job id to name a directory by: {job_id[:100]!r}")
    workspace = Workspace(work_dir / f"{job_id}-{attempt}", job_id, attempt)
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    wipe(workspace.root)
    try:
        for directory in (workspace.root, workspace.in_dir, workspace.out_dir):
            directory.mkdir(mode=0o700)
        yield workspace
    except LeftBehindError:
        raise
    except BaseException:
        _wipe_or_say(workspace.root)
        raise
    else:
        _wipe_or_say(workspace.root)


def own(work_dir: Path, name: str) -> Workspace:
    """Return a workspace of the daemon's own: no job's id begins with `_`."""
    return Workspace(work_dir / f"_{name}", name, 1)


def make_own(work_dir: Path, name: str) -> Workspace:
    """Make an empty workspace of the daemon's own; whoever has it wipes it."""
    workspace = own(work_dir, name)
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    wipe(workspace.root)
    for directory in (workspace.root, workspace.in_dir, workspace.out_dir):
        directory.mkdir(mode=0o700)
    return workspace


def _wipe_or_say(root: Path) -> None:
    try:
        wipe(root)
    except OSError as error:
        # The job's own outcome must not be lost over this; the next start sweeps.
        event(Event.LEFTOVERS_KEPT).error(
            "workspace {} could not be wiped, tried again at the next start: {}; see what "
            "holds it, and remove it by hand if it stays",
            root,
            error,
        )


def sweep(work_dir: Path, keep: set[str]) -> list[str]:
    """Wipe each entry of `work_dir` whose name is not in `keep`; returns the names wiped."""
    try:
        names = sorted(entry.name for entry in work_dir.iterdir())
    except FileNotFoundError:
        return []
    removed = [name for name in names if name not in keep]
    for name in removed:
        wipe(work_dir / name)
    return removed


def wipe(path: Path) -> None:
    """Remove `path` and all below it, whatever a child made of it; links are removed, never followed.

    Each directory is moved up beside the first one before it is emptied, so that neither a tree's depth
    nor the length of its paths matters. Raises `OSError` when something cannot be removed.
    """
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            path.unlink()
            return
    except FileNotFoundError:
        return
    fresh = (f".wipe-{os.getpid()}-{number}" for number in itertools.count())
    path.chmod(0o700)
    top = os.open(path, _DIRECTORY)
    try:
        waiting = _empty(top, top, fresh)
        while waiting:
            name = waiting.pop()
            directory = os.open(name, _DIRECTORY, dir_fd=top)
            try:
                waiting += _empty(directory, top, fresh)
            finally:
                os.close(directory)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    path.rmdir()


def _empty(directory: int, top: int, fresh: Iterator[str]) -> list[str]:
    """Unlink what `directory` holds and move its directories into `top`; returns their new names."""
    moved = []
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_dir in found:
        if not is_dir:
            os.unlink(name, dir_fd=directory)
            continue
        os.chmod(name, 0o700, dir_fd=directory)  # moving a directory rewrites its `..`: it must be writable
        new_name = next(fresh)
        while _exists(new_name, top):
            new_name = next(fresh)
        os.rename(name, new_name, src_dir_fd=directory, dst_dir_fd=top)
        moved.append(new_name)
    return moved


def _exists(name: str, directory: int) -> bool:
    try:
        os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def measure(root: Path) -> Usage:
    """Return what lies below `root`; see `walk`."""
    return collections.deque(walk(root), maxlen=1).pop()


class UsageMeter:
    """What a directory holds, counted at most a fiftieth of the time: a figure, not a job's limit."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._counting = threading.Lock()
        #: What was counted last.
        self.last = Usage(0, 0)
        self._next_s = 0.0

    def read(self) -> Usage:
        """Return the last count, after a new one when that is due and nobody else is at it."""
        if time.monotonic() >= self._next_s and self._counting.acquire(blocking=False):
            try:
                begun_s = time.monotonic()
                self.last = measure(self._root)
            except DiskQuotaError:
                pass  # a job's own limit deals with what it hides
            finally:
                took_s = time.monotonic() - begun_s
                self._next_s = begun_s + _COUNT_SHARE * took_s
                self._counting.release()
        return self.last


def walk(root: Path) -> Iterator[Usage]:
    """Count what lies below `root`, which may change meanwhile; links count as themselves.

    Yields what was found so far, every `_STEP_FILES` files and at the end, so that a caller can stop or
    rest. Raises `DiskQuotaError` for what cannot be measured: a child could hide any amount there.
    """
    total = files = 0
    linked: set[tuple[int, int]] = set()
    waiting = [os.fspath(root)]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    try:
                        info = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    files += 1
                    if stat.S_ISDIR(info.st_mode):
                        waiting.append(entry.path)
                    elif info.st_nlink > 1:
                        if (info.st_dev, info.st_ino) in linked:
                            continue
                        linked.add((info.st_dev, info.st_ino))
                    total += info.st_blocks * 512
                    if files % _STEP_FILES == 0:
                        yield Usage(total, files)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            shown = os.path.relpath(directory, root)[:100]
            raise DiskQuotaError(
                f"the job's directory {shown!r} cannot be measured: {error.strerror}"
            ) from None
    yield Usage(total, files)
