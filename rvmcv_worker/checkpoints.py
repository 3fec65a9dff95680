"""Where an attempt left off, brought to storage for the next one: while its child lives, and at its end.

A child writes `checkpoint-<epoch>.tar` into its directory, each whole and under a new name, and says so.
A living child could write on while its file is copied: then a bad file of its own is what the next attempt's
child opens, behind the wall. The daemon copies at most the size that it has looked at, hashes the copy, and
opens nothing.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rvmcv_worker.config import Settings
from rvmcv_worker.controller import ControllerError
from rvmcv_worker.errors import FencedError, JobCancelledError, JobCrashedError, JobError, UploadFailedError
from rvmcv_worker.events import Event, event
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.progress import ProgressReporter
from rvmcv_worker.protocol import Checkpoint, Resume, to_wire
from rvmcv_worker.retry import RetryStoppedError
from rvmcv_worker.storage import Storage, Stored
from rvmcv_worker.workspace import Workspace

#: The child whose checkpoints are kept, and what it calls them.
CHILD = "train"
_NAME = re.compile(r"checkpoint-(\d{1,9})\.tar")
#: The checkpoint that an attempt goes on from, as its children see it.
RESUME_FILE = "checkpoint.tar"
#: Objects while the child lives. The one that RVM-Server knows is not overwritten before it knows the other.
_IN_TURN = ("checkpoint-0.tar", "checkpoint-1.tar")
#: The object at the end of an attempt, or of its daemon.
_LAST = "checkpoint-last.tar"
#: Seconds for the last checkpoint to get into storage; a stop of the worker waits for it.
_LAST_S = 12.0
#: A checkpoint of YOLO11 has six times the size of its model: the optimizer keeps two fp32 for each fp16.
#: SAM2's has four at most: in fp32 the weights, the best so far, and two moments of all that is trained.
_MODELS_A_CHECKPOINT = 8
_MB = 1024**2

#: Puts a file into storage under the attempt's own key.
Put = Callable[[Path, str, Interrupt], Stored]


def max_bytes(settings: Settings) -> int:
    """Return the size of the largest checkpoint that is taken."""
    return int(_MODELS_A_CHECKPOINT * settings.limits.max_model_mb * _MB)


class StorageAwayError(Exception):
    """Storage does not take the last checkpoint now; it may later."""


class Checkpoints:
    """One attempt's; a context manager around it, with a thread that stores what the child has written."""

    def __init__(
        self,
        workspace: Workspace,
        put: Put,
        *,
        max_bytes: int,
        every_s: float,
        progress: ProgressReporter,
        interrupt: Interrupt,
    ) -> None:
        self._workspace = workspace
        self._put = put
        self._max_bytes = max_bytes
        self._every_s = every_s
        self._progress = progress
        self._interrupt = interrupt
        #: Ends an upload: with the attempt, but not for a stop, in which there is still time for it.
        self._cut = interrupt.branch()
        self._changed = threading.Condition()
        self._announced = False
        self._closed = False
        #: The newest that RVM-Server knows of this attempt.
        self._known: Checkpoint | None = None
        self._turn = 0
        self._thread = threading.Thread(target=self._run, name=f"checkpoints-{workspace.job_id}", daemon=True)

    def __enter__(self) -> Checkpoints:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if not self._thread.is_alive():
            self._cut.close()

    def announce(self) -> None:
        """The child says that it has written one; returns at once."""
        with self._changed:
            self._announced = True
            self._changed.notify()

    def know(self, checkpoint: Checkpoint) -> None:
        """A job without a child has stored one: the next progress tells it, and so does a hand-back."""
        self._known = checkpoint
        self._progress.update(checkpoint=to_wire(checkpoint))

    def store_last(self) -> Checkpoint | None:
        """Store the newest that the attempt has left, now that no child lives; None where there is none.

        Raises `StorageAwayError` for what takes longer than the stop of a worker can wait for.
        """
        self._close()
        if self._known and self._known.epoch == newest_epoch(self._workspace):
            return self._known
        return store_newest(self._workspace, self._put, self._max_bytes, self._interrupt)

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._cut.request(StopReason.WORKER_STOPPED, "the checkpoint comes too late")
        self._thread.join(1.0)  # one that hangs in its socket changes nothing any more

    def _run(self) -> None:
        due_s = time.monotonic() + self._every_s
        while True:
            with self._changed:
                while not self._closed and (not self._announced or due_s > time.monotonic()):
                    self._changed.wait(max(0.0, due_s - time.monotonic()) if self._announced else None)
                if self._closed:
                    return
                self._announced = False
            try:
                self._store_one()
            except (JobError, ControllerError, OSError) as error:
                if not self._closed:
                    event(Event.JOB_CHECKPOINT_LOST, self._workspace.job_id).warning(
                        "checkpoint not stored: {}; the next one is tried in its turn, see whether "
                        "storage answers if this goes on",
                        error,
                    )
            except (FencedError, JobCancelledError, RetryStoppedError):
                return
            due_s = time.monotonic() + self._every_s

    def _store_one(self) -> None:
        name = _IN_TURN[self._turn]
        found = _freeze_and_put(self._workspace, self._put, self._max_bytes, name, self._cut)
        if found is None or self._closed:
            return
        self._progress.tell_checkpoint(found, self._cut)
        self._known, self._turn = found, 1 - self._turn
        event(Event.JOB_CHECKPOINT_STORED, self._workspace.job_id).info(
            "checkpoint of epoch {} stored", found.epoch
        )


def newest_epoch(workspace: Workspace) -> int | None:
    """Return the number of the newest checkpoint in a child's directory; None when there is none."""
    matches = (_NAME.fullmatch(name) for name in workspace.child_files(CHILD))
    return max((int(match[1]) for match in matches if match), default=None)


def newest_file(workspace: Workspace) -> str | None:
    """Return the newest checkpoint in a child's directory, relative to the workspace, for a child to open."""
    epoch = newest_epoch(workspace)
    return None if epoch is None else f"{CHILD}/checkpoint-{epoch}.tar"


def store_newest(
    workspace: Workspace, put: Put, max_bytes: int, interrupt: Interrupt | None = None
) -> Checkpoint | None:
    """Store the newest checkpoint of a workspace in which nothing runs; None for one that nobody can have.

    Raises `StorageAwayError` when it is not stored within `_LAST_S`.
    """
    cut = interrupt.branch() if interrupt else Interrupt()
    found: list[Checkpoint | None] = []
    away: list[UploadFailedError] = []

    def store() -> None:
        try:
            found.append(_freeze_and_put(workspace, put, max_bytes, _LAST, cut))
        except UploadFailedError as error:
            away.append(error)
        except (JobError, JobCancelledError, FencedError, OSError) as error:
            event(Event.JOB_CHECKPOINT_LOST, workspace.job_id).warning(
                "the newest checkpoint is not stored: {}; the next attempt goes on from an "
                "earlier one, nothing to do",
                error,
            )

    # A thread of its own: a socket that hangs must not hold up a stop.
    thread = threading.Thread(target=store, name=f"checkpoint-{workspace.job_id}", daemon=True)
    thread.start()
    thread.join(_LAST_S)
    if thread.is_alive():
        cut.request(StopReason.WORKER_STOPPED, f"it takes longer than {_LAST_S:g} s")
        thread.join(1.0)
        if not found:
            raise StorageAwayError(f"the checkpoint is not stored within {_LAST_S:g} s")
    else:
        cut.close()
    if away:
        raise StorageAwayError(away[0].message)
    return found[0] if found else None


def _freeze_and_put(
    workspace: Workspace, put: Put, max_bytes: int, as_name: str, interrupt: Interrupt
) -> Checkpoint | None:
    epoch = newest_epoch(workspace)
    if epoch is None:
        return None
    try:
        frozen = workspace.read_back(CHILD, f"checkpoint-{epoch}.tar", max_bytes=max_bytes, as_name=as_name)
    except JobCrashedError:
        if newest_epoch(workspace) == epoch:
            raise
        return None  # a living child has put a newer one in its place, and says so
    if frozen is None:
        return None
    try:
        stored = put(frozen, as_name, interrupt)
    finally:
        frozen.unlink(missing_ok=True)
    return Checkpoint(path=stored.path, sha256=stored.sha256, epoch=epoch)


def fetch(
    storage: Storage, resume: Resume | None, workspace: Workspace, *, max_bytes: int, interrupt: Interrupt
) -> str | None:
    """Bring the checkpoint of an earlier attempt; returns its path in the workspace.

    None, with the reason in the log, for one that cannot be had or is not what was stored: the job then
    starts from the beginning.
    """
    if resume is None:
        return None
    refused = []
    for place in filter(None, (resume.path, resume.url)):
        try:
            storage.fetch(
                place,
                workspace.in_dir / RESUME_FILE,
                max_bytes=max_bytes,
                sha256=resume.sha256,
                interrupt=interrupt,
            )
        except JobError as error:
            interrupt.check()
            refused.append(error.message)
        else:
            of = f"epoch {resume.epoch}" if resume.next_index is None else f"{resume.next_index} images"
            event(Event.JOB_CONTINUED, workspace.job_id).info("going on from the checkpoint of {}", of)
            return f"in/{RESUME_FILE}"
    event(Event.JOB_STARTED_OVER, workspace.job_id).warning(
        "the checkpoint of an earlier attempt cannot be had ({}): the job starts from the beginning, "
        "nothing to do",
        "; ".join(refused),
    )
    return None
