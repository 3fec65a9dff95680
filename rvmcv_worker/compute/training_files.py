"""The files of a training that are worth publishing: a fixed list of names, gathered in one place."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

_CURVES = tuple(f"{kind}{curve}_curve.png" for kind in ("Box", "Mask") for curve in ("F1", "P", "PR", "R"))

#: Every name that a training may leave in its directory to be published.
PUBLISHED_FILES = (
    "best.pt",
    "best.safetensors",
    "results.csv",
    "args.yaml",
    "results.png",
    "labels.jpg",
    "confusion_matrix.png",
    "confusion_matrix_normalized.png",
    *_CURVES,
    *(f"train_batch{number}.jpg" for number in range(6)),
    *(f"val_batch{number}_{kind}.jpg" for number in range(3) for kind in ("labels", "pred")),
)


def gather(run: Path, directory: Path) -> list[str]:
    """Move what can be published from Ultralytics' `run` into `directory`; returns all names there.

    `run` need not exist. `best.pt` and `args.yaml` are not moved: the ones in `run` name local paths.
    """
    # Ultralytics draws its batches in threads of their own and does not wait for them.
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    if run.is_dir():
        _number_batches(run)
    for name in set(PUBLISHED_FILES) - {"best.pt", "args.yaml"}:
        if (run / name).is_file():
            (run / name).replace(directory / name)
    return [name for name in PUBLISHED_FILES if (directory / name).is_file()]


def clear(run: Path, directory: Path) -> None:
    """Remove what an earlier child of the same job left: its `run`, and what it had gathered."""
    shutil.rmtree(run, ignore_errors=True)
    for name in PUBLISHED_FILES:
        (directory / name).unlink(missing_ok=True)


def _number_batches(run: Path) -> None:
    """Rename batches drawn after mosaic was closed (``train_batch450.jpg``, …) to 3, 4, 5."""
    matches = (re.fullmatch(r"train_batch(\d+)\.jpg", path.name) for path in run.iterdir())
    numbers = sorted(int(match[1]) for match in matches if match)
    for position, number in enumerate(numbers[:6]):
        if number != position:
            (run / f"train_batch{number}.jpg").replace(run / f"train_batch{position}.jpg")
