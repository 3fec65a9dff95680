"""How much SAM2 works on at once, and less of it where the GPU's memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from rvmcv_worker.compute.training_faults import is_out_of_gpu_memory
from rvmcv_worker.errors import OutOfGpuMemoryError
from rvmcv_worker.sam2_options import Sam2Options

_Done = TypeVar("_Done")

#: Pixels of the squares that are encoded at once, and of those whose objects are decoded at once, before any
#: memory ran out. On a CPU they should fit its cache: at 1024 px two objects are as fast as any number, at
#: 256 px sixteen take two thirds of the time that they take one by one.
_IMAGES_PX = {"cpu": 1024**2, "cuda": 2**62}
_OBJECTS_PX = {"cpu": 2 * 1024**2, "cuda": 64 * 1024**2}


class Memory:
    """Images and objects at once. What is computed does not depend on them, to rounding; the time does.

    The ladder goes down: half the objects, down to one; then half the images, with as many objects as at
    first, since it is the encoder that takes the memory where one object was too much.
    """

    def __init__(self, options: Sam2Options, device: torch.device, said: Callable[[str], None]) -> None:
        """`said` is told, in a sentence, of each rung that is taken."""
        self._options = options
        self._device = device
        self._said = said
        square_px = options.imgsz**2
        self.images_at_once = min(_IMAGES_PX[device.type] // square_px, options.batch)
        self._objects_at_first = min(_OBJECTS_PX[device.type] // square_px, options.batch * options.objects)
        self.objects_at_once = self._objects_at_first

    def attempt(self, work: Callable[[], _Done], *, decodes: bool = True) -> _Done:
        """Return what `work` returns, called again with less at once as often as it runs out of GPU memory.

        It begins afresh each time. Where it decodes no objects, fewer of them are no help to it. Raises
        `OutOfGpuMemoryError` where one of each is too much.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_gpu_memory(error):
                    raise
            # Only now that the error is gone, nothing holds the tensors of the frames it came through.
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if not self.shrink(decodes=decodes):
                raise self._too_small()

    def shrink(self, *, decodes: bool = True) -> bool:
        """Take the next rung; false where there is none."""
        if decodes and self.objects_at_once > 1:
            self.objects_at_once //= 2
        elif self.images_at_once > 1:
            self.images_at_once //= 2
            if decodes:
                self.objects_at_once = self._objects_at_first
        else:
            return False
        self._said(
            "the GPU's memory ran out: going on with "
            f"{_count(self.objects_at_once, 'object')} and {_count(self.images_at_once, 'image')} at once"
        )
        return True

    def _too_small(self) -> OutOfGpuMemoryError:
        options = self._options
        return OutOfGpuMemoryError(
            f"the GPU's memory does not hold one image and one object at {options.imgsz} px; "
            f"use a smaller img_size or model{', or train less of it' if options.train != 'decoder' else ''}",
            detail={"batch": self.images_at_once, "objects": self.objects_at_once},
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
