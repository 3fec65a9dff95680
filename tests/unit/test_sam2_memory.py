"""How SAM2's training does with less at once where the GPU's memory runs out."""

from __future__ import annotations

import weakref

import pytest
import torch

from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.errors import OutOfGpuMemoryError
from rvmcv_worker.sam2_options import Sam2Options

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _ladder(memory: Memory, *, decodes: bool = True) -> list[tuple[int, int]]:
    """Go down; return (images, objects) at once of each rung."""
    rungs = [(memory.images_at_once, memory.objects_at_once)]
    while memory.shrink(decodes=decodes):
        rungs.append((memory.images_at_once, memory.objects_at_once))
    return rungs


def _memory(**options: int) -> Memory:
    """A memory that can shrink, as a GPU's; no more of CUDA is needed for it."""
    memory = Memory(Sam2Options.model_validate(options), CPU, lambda _: None)
    memory.images_at_once, memory.objects_at_once = 2, 4
    memory._objects_at_first = 4
    return memory


def test_a_gpu_begins_with_all_images() -> None:
    memory = Memory(Sam2Options(batch=8, objects=16), CUDA, lambda _: None)
    assert (memory.images_at_once, memory.objects_at_once) == (8, 64)
    memory = Memory(Sam2Options(batch=2, objects=3), CUDA, lambda _: None)
    assert (memory.images_at_once, memory.objects_at_once) == (2, 6), "no more than there are"


def test_a_cpu_begins_with_what_its_cache_holds() -> None:
    for imgsz, at_once in ((1024, (1, 2)), (640, (2, 5)), (256, (8, 32)), (64, (8, 128))):
        memory = Memory(Sam2Options(batch=8, objects=16, imgsz=imgsz), CPU, lambda _: None)
        assert (memory.images_at_once, memory.objects_at_once) == at_once, imgsz


def test_fewer_objects_then_fewer_images() -> None:
    assert _ladder(_memory()) == [(2, 4), (2, 2), (2, 1), (1, 4), (1, 2), (1, 1)]


def test_fewer_objects_are_no_help_to_the_encoder() -> None:
    assert _ladder(_memory(), decodes=False) == [(2, 4), (1, 4)]


def test_every_rung_is_told() -> None:
    said: list[str] = []
    memory = Memory(Sam2Options(batch=2, objects=1), CUDA, said.append)
    _ladder(memory)
    assert said == [
        "the GPU's memory ran out: going on with 1 object and 2 images at once",
        "the GPU's memory ran out: going on with 2 objects and 1 image at once",
        "the GPU's memory ran out: going on with 1 object and 1 image at once",
    ]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("a test"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")],
)
def test_what_ran_out_is_done_again_with_less(error: Exception) -> None:
    memory, tried = _memory(), []

    def work() -> str:
        tried.append(memory.objects_at_once)
        if memory.objects_at_once > 1:
            raise error
        return "done"

    assert memory.attempt(work) == "done"
    assert tried == [4, 2, 1]
    assert memory.attempt(work) == "done"
    assert tried == [4, 2, 1, 1], "it stays with what fits"


def test_nothing_of_what_ran_out_is_held_when_it_is_done_again() -> None:
    memory = _memory()
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> bool:
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        if len(held) == 1:
            raise torch.OutOfMemoryError("a test")
        return held[0]() is None

    assert memory.attempt(work)


def test_where_one_of_each_is_too_much_it_is_an_error_of_the_job() -> None:
    memory, tried = _memory(imgsz=512), []
    memory.images_at_once, memory.objects_at_once = 1, 2

    def work() -> None:
        tried.append((memory.images_at_once, memory.objects_at_once))
        raise torch.OutOfMemoryError("a test")

    with pytest.raises(
        OutOfGpuMemoryError, match="one image and one object at 512 px; use a smaller"
    ) as caught:
        memory.attempt(work)
    assert tried == [(1, 2), (1, 1)]
    assert caught.value.detail == {"batch": 1, "objects": 1}
    assert caught.value.__context__ is None


def test_other_errors_are_not_tried_again() -> None:
    memory, tried = _memory(), []

    def work() -> None:
        tried.append(1)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        memory.attempt(work)
    assert tried == [1]
    assert memory.objects_at_once == 4
