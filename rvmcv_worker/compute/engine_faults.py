"""Which of the protocol's errors a fault inside an engine is."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rvmcv_worker.compute.training_faults import is_out_of_gpu_memory, without_root
from rvmcv_worker.errors import InternalError, JobError, OutOfGpuMemoryError, OutOfMemoryError

# What PyTorch and OpenCV say when the system gives them no memory: a RuntimeError, a cv2.error.
_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "Insufficient memory", "bad allocation")

DoneT = TypeVar("DoneT")


class GpuBrokenError(Exception):
    """The process can use its GPU no more: every call fails from here on."""


def attempt(work: Callable[[], DoneT], make_room: Callable[[], None], root: Path) -> DoneT:
    """Do `work`; where memory is short, once more after `make_room`.

    Raises the request's `JobError`, or `GpuBrokenError`. Messages tell paths without `root`.
    """
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - whatever it was becomes the request's error
        if not is_out_of_memory(behind(error)):
            raise explain(error, root) from None
    # Not in the handler: its traceback keeps alive what the attempt had in memory.
    make_room()
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - as above
        raise explain(behind(error), root) from None


def behind(error: Exception) -> Exception:
    """Return the shortage of memory that made a loader call a checkpoint bad, if it was one."""
    cause = error.__cause__
    return cause if isinstance(cause, Exception) and is_out_of_memory(cause) else error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short, of the GPU or of the machine; with other models dropped it may suffice."""
    texts = any(told in str(error) for told in _MEMORY_TEXTS)
    return isinstance(error, MemoryError) or texts or is_out_of_gpu_memory(error)


def explain(error: Exception, root: Path) -> JobError:
    """Return the request's error; an unknown one is printed and `internal`."""
    if isinstance(error, JobError):
        return error
    if is_out_of_gpu_memory(error):
        return OutOfGpuMemoryError(
            "the GPU's memory does not hold this image's inference, not even with no other model loaded; "
            "use a smaller img_size or model"
        )
    if is_out_of_memory(error):
        return OutOfMemoryError(
            "memory does not hold this image's inference, not even with no other model loaded; "
            "use a smaller image, img_size or model"
        )
    if "CUDA error" in str(error):
        raise GpuBrokenError(str(error)) from error
    traceback.print_exception(error)
    return InternalError(f"{type(error).__name__} in the engine: {without_root(str(error), root)}")
