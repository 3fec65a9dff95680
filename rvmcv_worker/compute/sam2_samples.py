"""A split as SAM2 is trained and measured on it: squares and masks, made when they are asked for.

No pixel is kept: an image is decoded again each time, and what is worth keeping is the encoder's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rvmcv_worker.compute import image_decode, sam2_square
from rvmcv_worker.errors import DatasetInvalidError, ImageInvalidError

if TYPE_CHECKING:
    from rvmcv_worker.compute.instances import Instance, LabelledImage

#: An object with fewer pixels of the square is left out. The decoder draws its masks at a quarter of the
#: square's edge: this is one pixel of them, and a smaller object is none that it could draw.
MIN_OBJECT_PX = 16

_CPU = torch.device("cpu")


class Flip(NamedTuple):
    """How a square and its masks are mirrored."""

    horizontal: bool = False
    vertical: bool = False

    def apply(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return (…, height, width) mirrored."""
        axes = [axis for axis, mirrored in ((-1, self.horizontal), (-2, self.vertical)) if mirrored]
        return pixels.flip(axes) if axes else pixels


UPRIGHT = Flip()


@dataclass(frozen=True, slots=True)
class _Usable:
    image: LabelledImage
    objects: tuple[Instance, ...]


class Samples:
    """The images of a split that have objects to learn from; all others are left out and counted.

    Raises `DatasetInvalidError` where none has.
    """

    def __init__(
        self,
        data: Path,
        images: Sequence[LabelledImage],
        image_px: int,
        *,
        split: str = "train",
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._data = data
        self.image_px = image_px
        self.split = split
        #: Objects that are left out as too small, and images that are left out without any other.
        self.tiny_objects = self.unused_images = 0
        self._usable: list[_Usable] = []
        for image in images:
            check_stop()
            large = tuple(found for found in image.instances if self._is_large(found))
            self.tiny_objects += len(image.instances) - len(large)
            if large:
                self._usable.append(_Usable(image, large))
            else:
                self.unused_images += 1
        if not self._usable:
            raise DatasetInvalidError(self._why_empty(len(images)))

    def __len__(self) -> int:
        return len(self._usable)

    @property
    def object_count(self) -> int:
        """The usable objects of all images."""
        return sum(len(usable.objects) for usable in self._usable)

    def describe(self) -> dict[str, int]:
        """Return what there is and what is left out, for a result's `effective`."""
        return {
            "images": len(self),
            "objects": self.object_count,
            "unused_images": self.unused_images,
            "tiny_objects": self.tiny_objects,
        }

    def labelled(self, index: int) -> LabelledImage:
        """Return what is known of an image: its path, its size, and all that is labelled in it."""
        return self._usable[index].image

    def objects(self, index: int) -> tuple[Instance, ...]:
        """Return an image's usable objects."""
        return self._usable[index].objects

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return the upright image itself, (height, width, 3) BGR.

        Raises `DatasetInvalidError` unless it is the one whose labels were prepared.
        """
        labelled = self.labelled(index)
        size = (labelled.height, labelled.width)
        try:
            content = (self._data / labelled.path).read_bytes()
            image = image_decode.decode(content, labelled.height * labelled.width)
        except ImageInvalidError as error:
            raise DatasetInvalidError(f"{labelled.path}: {error.message}") from error
        if image.shape[:2] != size:
            raise DatasetInvalidError(
                f"{labelled.path}: its labels are for {size[1]} x {size[0]} pixels, "
                f"but it has {image.shape[1]} x {image.shape[0]}"
            )
        return image

    def square(self, index: int, flip: Flip = UPRIGHT) -> torch.Tensor:
        """Return an image as the encoder takes it: (3, image_px, image_px) float32 on the CPU."""
        return flip.apply(sam2_square.square(self.image(index), self.image_px, _CPU))

    def masks(self, index: int, chosen: Sequence[int] | None = None, flip: Flip = UPRIGHT) -> torch.Tensor:
        """Return the masks of the `chosen` usable objects, or of all: (m, image_px, image_px) bool, CPU."""
        objects = self.objects(index)
        wanted = objects if chosen is None else [objects[number] for number in chosen]
        masks = np.stack([found.mask(self.image_px, self.image_px) for found in wanted])
        return flip.apply(torch.from_numpy(masks))

    def _is_large(self, found: Instance) -> bool:
        return int(np.count_nonzero(found.mask(self.image_px, self.image_px))) >= MIN_OBJECT_PX

    def _why_empty(self, count: int) -> str:
        if not count:
            return f"the {self.split} split has no images"
        if not self.tiny_objects:
            return f"none of the {count} images of the {self.split} split has an object in its labels"
        return (
            f"all {self.tiny_objects} objects of the {self.split} split are smaller than {MIN_OBJECT_PX} "
            f"pixels once an image is stretched to {self.image_px} x {self.image_px}: "
            "label larger ones or train at a larger imgsz"
        )


@dataclass(frozen=True)
class Batch:
    """What one step of the optimizer learns from: n images and m of their objects, on a network's device."""

    #: The network's frozen output, each (n, …).
    frozen: tuple[torch.Tensor, ...]
    #: (m, px, px) bool
    masks: torch.Tensor
    #: (m,) int64: which of the n images an object is in, in rising order; none is without an object.
    image_of: torch.Tensor
