"""The entry of every child: `job.json` -> run a task -> `result.json`.

Started as ``python -m rvmcv_worker.compute.child DIR`` with the job's root as working directory;
`DIR` (``prepare``, ``train``, ``check``) is the one directory the child may write. All paths in
`job.json` are relative to the job's root, so they hold with and without the wall:

    in/         what the daemon fetched            (read-only)
    prepare/    written by the prepare child       (read-only to later children)
    train/ …    the child's own directory

`job.json` is ``{"task": …, "progress_fd": n, …the task's own keys}``. `result.json` is
``{"ok": true, "result": …}`` or ``{"ok": false, "error": {"code", "message"}, "detail": …}``.
Exit status: 0 with a result, 1 after an error that `result.json` names; anything else is a crash.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rvmcv_worker import framing
from rvmcv_worker.compute import ranks
from rvmcv_worker.errors import DiskQuotaError, InternalError, JobError

#: Task name -> module that has ``run(job, child) -> result``. The list is closed: a job cannot name a module.
TASKS = {
    "prepare": "rvmcv_worker.compute.datasets",
    "check_model": "rvmcv_worker.compute.check_model",
    "export_model": "rvmcv_worker.compute.export",
    "train_yolo11": "rvmcv_worker.compute.yolo11_train",
    "train_sam2": "rvmcv_worker.compute.sam2_train",
    "engine": "rvmcv_worker.compute.engine",
    "stub": "rvmcv_worker.compute.stub",
}

#: The system's answers to a write for which there is no room, or that goes over RLIMIT_FSIZE.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StopRequestedError(Exception):
    """The daemon asked the child to stop; what it has so far is of no more use."""


@dataclass
class Child:
    """What a task may use of the world: its directory, its voice, and the wish to stop."""

    root: Path
    directory: Path
    progress_fd: int
    #: Which process of a training on several GPUs this is, if it is one of several; 0 speaks for all.
    rank: int | None = None
    stop_requested: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def report(self, **progress: Any) -> None:
        """Send one progress message; its keys are those of the protocol's `progress`."""
        with self._lock:
            framing.write(self.progress_fd, progress)

    def check_stop(self) -> None:
        """Raise `StopRequestedError` when the daemon has asked for it; call this at least once a batch."""
        if self.stop_requested.is_set():
            raise StopRequestedError


def write_result(child: Child, result: dict[str, Any]) -> None:
    """Write `result.json`, or that of another rank, whole or not at all."""
    text = json.dumps(framing.finite(result), allow_nan=False)
    name = ranks.result_name(child.rank)
    part = child.directory / f"{name}.part"
    part.write_text(text)
    part.replace(child.directory / name)


def run_task(job: dict[str, Any], child: Child) -> int:
    """Run the task that `job` names; returns the exit status."""
    try:
        module = importlib.import_module(TASKS[job["task"]])
        result = module.run(job, child)
    except StopRequestedError:
        write_result(child, {"ok": False, "stopped": True})
        return 1
    except JobError as error:
        write_result(child, {"ok": False, "error": error.to_wire(), "detail": error.detail})
        return 1
    except Exception as error:  # noqa: BLE001 - the last stop: whatever it was becomes the result
        traceback.print_exc()
        message = f"{type(error).__name__} in the {job['task']} child: {error}"
        no_room = isinstance(error, OSError) and error.errno in NO_ROOM
        wrong = DiskQuotaError(message) if no_room else InternalError(message)
        write_result(child, {"ok": False, "error": wrong.to_wire()})
        return 1
    write_result(child, {"ok": True, "result": result})
    return 0


def main() -> int:
    """Read `job.json`, listen for SIGTERM, run."""
    root = Path.cwd()
    directory = root / sys.argv[1]
    rank = ranks.own_rank()
    job = json.loads((directory / ranks.job_name(rank)).read_text())
    progress_fd = int(job["progress_fd"])
    if rank is not None:
        progress_fd = ranks.open_progress(progress_fd, rank)
    child = Child(root=root, directory=directory, progress_fd=progress_fd, rank=rank)
    os.set_inheritable(child.progress_fd, False)

    def on_sigterm(_signum: int, _frame: FrameType | None) -> None:
        child.stop_requested.set()

    signal.signal(signal.SIGTERM, on_sigterm)
    return run_task(job, child)


if __name__ == "__main__":
    # Tasks import this module by its name: it must not be there twice, each with exceptions of its own.
    sys.exit(importlib.import_module("rvmcv_worker.compute.child").main())
