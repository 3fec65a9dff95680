"""Where a YOLO11 training left off: kept while it trains, gone on from by the child of a later attempt.

What a checkpoint holds beside its state: `last.pt`, which Ultralytics goes on from; `best.pt`, the best model
so far, since a run that goes on writes one only when it becomes better still; and the rows of `results.csv`.
All of it is without paths of the machine that it was made on.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker.compute import checkpoint, checkpoint_file
from rvmcv_worker.compute.checkpoint_file import CheckpointError, Run, State
from rvmcv_worker.compute.checkpoint_keeper import CheckpointKeeper
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.training_progress import TrainingProgress

_FILES = frozenset({"last.pt", "best.pt", "results.csv"})
#: Settings that Ultralytics finds out at the start of a training (`optimizer=auto`) and needs again.
_FOUND_OUT = ("optimizer", "lr0", "warmup_bias_lr")


class TrainingCheckpoints(CheckpointKeeper):
    """Keeps what Ultralytics saves after an epoch."""

    def __init__(
        self, child: Child, output: Path, progress: TrainingProgress, earlier: State, *, attempt: int
    ) -> None:
        super().__init__(child, progress, earlier)
        self._output = output
        self._attempt = attempt

    def on_fit_epoch_end(self, trainer: Any) -> None:
        """Note an epoch that Ultralytics has saved and progress has told, and keep it when it is time to."""
        epochs = self._progress.epochs_done
        if epochs == self.state.epochs:  # the evaluation of best.pt, after the last
            return
        run = Run(
            attempt=self._attempt,
            epochs=epochs - self._earlier.epochs,
            batch_size=trainer.batch_size,
            img_size=trainer.args.imgsz,
        )
        # At the end `last.pt` loses what it takes to go on: it is kept before that.
        self._note(run, ended_by=self._progress.ended_by(epochs) if trainer.stop else None)

    def _gather(self, parts: Path) -> dict[str, Path]:
        weights = self._output / "weights"
        epochs, settings = checkpoint.left_off_at(weights / "last.pt")
        if epochs != self.state.epochs:
            raise CheckpointError(f"last.pt is of epoch {epochs}, not of {self.state.epochs}")
        settings = checkpoint.neutral(settings)
        checkpoint.clean_to_resume(weights / "last.pt", parts / "last.pt", settings)
        if (weights / "best.pt").exists():  # none while every fitness is NaN
            checkpoint.clean(weights / "best.pt", parts / "best.pt", settings)
        header, *rows = (self._output / "results.csv").read_text().splitlines(keepends=True)
        rows = [row for row in rows if float(row.split(",")[0]) <= epochs]
        (parts / "results.csv").write_text("".join([header, *rows]))
        return {name: parts / name for name in sorted(_FILES) if (parts / name).exists()}


@dataclass(frozen=True)
class LeftOff:
    """Where a training goes on; a smaller batch or size that it had come down to stays."""

    state: State
    batch: int
    imgsz: int


def restore(path: Path, output: Path, label_task: str, args: Any, names: list[str]) -> LeftOff:
    """Make `output` what Ultralytics had left of the run at `path`, to go on with the settings `args`.

    Nothing in the file runs. Raises `CheckpointError` or `ModelInvalidError` for one that cannot be used.
    """
    weights = output / "weights"
    weights.mkdir(parents=True)
    unpacked = output / "unpacked"
    unpacked.mkdir()
    state = checkpoint_file.unpack(path, unpacked, _FILES)
    for file in unpacked.glob("*.pt"):
        found = checkpoint.class_names(checkpoint.open_yolo11(file, label_task).model)
        if found != names:
            raise CheckpointError(f"its classes are {found}, those of the data set {names}")
    epochs, stored = checkpoint.left_off_at(unpacked / "last.pt")
    if not 0 < epochs == state.epochs or (epochs >= args.epochs and state.ended_by is None):
        raise CheckpointError(f"it is of epoch {epochs} (it says {state.epochs}) of {args.epochs}")
    left_off = LeftOff(
        state=state,
        batch=min(args.batch, int(stored["batch"])),
        imgsz=min(args.imgsz, int(stored["imgsz"])),
    )
    settings = {
        **vars(args),
        **{key: stored[key] for key in _FOUND_OUT},
        "task": label_task,
        "batch": left_off.batch,
        "imgsz": left_off.imgsz,
    }
    checkpoint.clean_to_resume(unpacked / "last.pt", weights / "last.pt", settings)
    if (unpacked / "best.pt").exists():
        (unpacked / "best.pt").replace(weights / "best.pt")
    (unpacked / "results.csv").replace(output / "results.csv")
    shutil.rmtree(unpacked)
    return left_off
