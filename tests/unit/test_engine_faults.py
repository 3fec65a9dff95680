"""What becomes of a fault inside an engine, and who gets a second try."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rvmcv_worker.compute.engine_faults import GpuBrokenError, attempt
from rvmcv_worker.errors import (
    InternalError,
    JobError,
    ModelInvalidError,
    OutOfGpuMemoryError,
    OutOfMemoryError,
)

pytestmark = pytest.mark.slow  # imports torch

ROOT = Path("/somewhere/work")


def cpu_shortage() -> Exception:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


def gpu_shortage() -> Exception:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")


def wrapped_shortage() -> Exception:
    error = ModelInvalidError("does not load")
    error.__cause__ = cpu_shortage()
    return error


SHORTAGES: list[tuple[Callable[[], Exception], type[JobError]]] = [
    (MemoryError, OutOfMemoryError),
    (cpu_shortage, OutOfMemoryError),
    (gpu_shortage, OutOfGpuMemoryError),
    (wrapped_shortage, OutOfMemoryError),
]


class Work:
    """Fails so many times with an error, then succeeds; notes what was done."""

    def __init__(self, error: Exception, times: int) -> None:
        self._error, self._times = error, times
        self.done: list[str] = []

    def __call__(self) -> str:
        self.done.append("work")
        if self.done.count("work") <= self._times:
            raise self._error
        return "answer"

    def make_room(self) -> None:
        self.done.append("room")


@pytest.mark.parametrize(("shortage", "_error"), SHORTAGES)
def test_what_runs_short_of_memory_is_tried_again_with_more_room(
    shortage: Callable[[], Exception], _error: type[JobError]
) -> None:
    work = Work(shortage(), times=1)
    assert attempt(work, work.make_room, ROOT) == "answer"
    assert work.done == ["work", "room", "work"]


@pytest.mark.parametrize(("shortage", "error"), SHORTAGES)
def test_what_runs_short_of_memory_twice_has_failed(
    shortage: Callable[[], Exception], error: type[JobError]
) -> None:
    work = Work(shortage(), times=9)
    with pytest.raises(error, match="not even with no other model loaded"):
        attempt(work, work.make_room, ROOT)
    assert work.done == ["work", "room", "work"]


def test_other_faults_are_not_tried_again() -> None:
    work = Work(ModelInvalidError("not a checkpoint"), times=9)
    with pytest.raises(ModelInvalidError, match=r"^not a checkpoint$"):
        attempt(work, work.make_room, ROOT)
    assert work.done == ["work"]


def test_an_unknown_fault_is_internal_and_told_without_the_place() -> None:
    work = Work(ValueError(f"{ROOT}/in/models/a.pt is odd"), times=9)
    with pytest.raises(InternalError, match=r"^ValueError in the engine: in/models/a.pt is odd$"):
        attempt(work, work.make_room, ROOT)
    assert work.done == ["work"]


def test_a_broken_gpu_is_no_fault_of_the_request() -> None:
    work = Work(RuntimeError("CUDA error: an illegal memory access was encountered"), times=9)
    with pytest.raises(GpuBrokenError):
        attempt(work, work.make_room, ROOT)
