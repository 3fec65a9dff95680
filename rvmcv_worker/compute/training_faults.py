"""Which of the protocol's errors a fault in a training is."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from rvmcv_worker.compute.child import NO_ROOM
from rvmcv_worker.errors import (
    DatasetInvalidError,
    DiskQuotaError,
    InternalError,
    InvalidJobError,
    JobError,
    OutOfGpuMemoryError,
    OutOfMemoryError,
)

# Ultralytics raises plain RuntimeError, ValueError and FileNotFoundError; only the text tells them apart.
_DATASET_TEXTS = ("Dataset '", "No valid images", "No labels found", "loading data")
_GPU_MEMORY_TEXTS = ("CUDA out of memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
_OPTION_TEXTS = ("froze the entire model", "final batch=1")


def refuse_diverged(trainer: Any) -> None:
    """Raise `InvalidJobError` when a training ended with numbers that are not finite, and finds nothing.

    Ultralytics repeats an epoch that diverges, except the first; and writes zeros for NaN into best.pt.
    """
    if not trainer.loss.isfinite() and not trainer.validator.metrics.fitness > 0:
        loss = float(trainer.loss)
        raise InvalidJobError(f"the training diverged (loss {loss}); use a smaller lr0, or another optimizer")


def is_out_of_gpu_memory(error: Exception) -> bool:
    """Whether the GPU's memory was too small; a smaller batch may fit."""
    import torch

    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(told in text for told in _GPU_MEMORY_TEXTS)


def explain(error: Exception, batch: int, imgsz: int, started: bool, root: Path) -> JobError:
    """Return the job's error for what a training raised; an unknown one is printed and `internal`.

    `batch` and `imgsz` (pixels) are those that were in effect.
    """
    text = without_root(str(error), root)
    if isinstance(error, JobError):
        return error
    if is_out_of_gpu_memory(error):
        return OutOfGpuMemoryError(
            f"the GPU's memory does not hold batch {batch} at {imgsz} px; "
            "use a smaller batch_size, img_size or model"
        )
    if isinstance(error, MemoryError) or "DataLoader worker" in text:
        return OutOfMemoryError(f"the training ran out of memory ({text}); use fewer workers, or no cache")
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return DiskQuotaError(f"no room left while training: {text}")
    if not started and any(told in text for told in _DATASET_TEXTS):
        return DatasetInvalidError(f"the data set cannot be trained on: {text}")
    if "NaN" in text:
        return InvalidJobError(f"the training diverged ({text}); use a smaller lr0, or another optimizer")
    if any(told in text for told in _OPTION_TEXTS):
        return InvalidJobError(f"the training's options do not hold: {text}")
    traceback.print_exception(error)
    return InternalError(f"{type(error).__name__} in the training: {text}")


def without_root(text: str, root: Path) -> str:
    """Return `text` in which paths are relative to the job's `root`."""
    return text.replace(f"{root}/", "")
