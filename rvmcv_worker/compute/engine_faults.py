"""Which of the protocol's errors a fault inside an engine is."""

from __future__ import annotations

import traceback
from pathlib import Path

from rvmcv_worker.compute.training_faults import is_out_of_gpu_memory, without_root
from rvmcv_worker.errors import InternalError, JobError, OutOfGpuMemoryError, OutOfMemoryError

# What PyTorch and OpenCV say when the system gives them no memory: a RuntimeError, a cv2.error.
_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "Insufficient memory", "bad allocation")
#: Longest message that is told, in characters; the log has all of it.
_MAX_MESSAGE = 2000


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short, of the GPU or of the machine; with other models dropped it may suffice."""
    texts = any(told in str(error) for told in _MEMORY_TEXTS)
    return isinstance(error, MemoryError) or texts or is_out_of_gpu_memory(error)


def is_gpu_broken(error: Exception) -> bool:
    """Whether the process can use its GPU no more: after such an error every call fails."""
    return "CUDA error" in str(error) and not is_out_of_gpu_memory(error)


def explain(error: Exception, root: Path) -> JobError:
    """Return the request's error; an unknown one is printed and `internal`. Paths are told without `root`."""
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
    traceback.print_exception(error)
    text = f"{type(error).__name__} in the engine: {without_root(str(error), root)}"
    return InternalError(text[:_MAX_MESSAGE])
