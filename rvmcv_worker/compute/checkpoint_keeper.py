"""When a checkpoint is written: after the first epoch, the last, and as many as cost little time."""

from __future__ import annotations

import shutil
import time
import traceback
from abc import ABC, abstractmethod
from pathlib import Path

from rvmcv_worker.compute import checkpoint_file
from rvmcv_worker.compute.checkpoint_file import Run, State
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.epoch_progress import EpochProgress

#: Most of a training's time that may go into its checkpoints.
_SHARE = 0.03


class CheckpointKeeper(ABC):
    """Keeps how far a training is; what goes into a checkpoint beside that is known to who trains."""

    def __init__(self, child: Child, progress: EpochProgress, earlier: State) -> None:
        self.state = earlier
        self._child = child
        self._progress = progress
        self._earlier = earlier
        self._written = True
        self._next_s = time.monotonic()

    def keep_newest(self) -> None:
        """Write what was noted since the last checkpoint; a training does not end over one that fails."""
        if self._written:
            return
        start_s = time.monotonic()
        parts = self._child.directory / "checkpoint-parts"
        try:
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir()
            checkpoint_file.write(self._child.directory, self.state, self._gather(parts))
        except Exception:  # noqa: BLE001  the training is worth more than its checkpoint
            traceback.print_exc()
        else:
            self._written = True
            self._child.report(checkpoint={"epoch": self.state.epochs})
        shutil.rmtree(parts, ignore_errors=True)
        now_s = time.monotonic()
        self._next_s = now_s + (now_s - start_s) / _SHARE

    def _note(self, run: Run, *, ended_by: str | None) -> None:
        """Note an epoch that progress has told, of this child's `run`; keep it when it is time to."""
        self.state = self._earlier.after(
            run, self._progress.history, trained_s=self._progress.elapsed_s, ended_by=ended_by
        )
        self._written = False
        if ended_by or time.monotonic() >= self._next_s:
            self.keep_newest()

    @abstractmethod
    def _gather(self, parts: Path) -> dict[str, Path]:
        """Return what goes with the epoch that was noted last, name -> file; `parts` is an empty folder."""
