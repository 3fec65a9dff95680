"""The masks of a YOLO11-seg model itself: made a few at a time, kept packed.

As an array of bytes, 300 masks of an image of 12 megapixels are 3.6 GB; packed they are some 10 kB each.
Call `ultralytics_env.isolate` first: this module imports Ultralytics.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from ultralytics.utils import ops

#: Pixels of the masks that are made at once.
_PIXELS_AT_ONCE = 32_000_000


class PackedMasks:
    """Masks of one image, each unpacked anew whenever it is asked for."""

    def __init__(self, size: tuple[int, int]) -> None:
        #: Height and width in pixels.
        self._size = size
        self._packed: list[bytes] = []

    def add(self, mask: NDArray[np.bool_]) -> None:
        """Keep a (height, width) mask."""
        self._packed.append(zlib.compress(np.packbits(mask).tobytes(), 1))

    def __len__(self) -> int:
        return len(self._packed)

    def __iter__(self) -> Iterator[NDArray[np.bool_]]:
        height, width = self._size
        for packed in self._packed:
            bits = np.frombuffer(zlib.decompress(packed), np.uint8)
            yield np.unpackbits(bits, count=height * width).reshape(self._size).view(np.bool_)


def of_image(
    prototypes: torch.Tensor, coefficients: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]
) -> Iterator[torch.Tensor]:
    """Yield (height, width) masks of an image of `size`, cropped to `boxes`, which are in its pixels."""
    for few, identity, some in _few(prototypes, coefficients, boxes, size):
        yield from ops.process_mask_native(few, identity, some, size)


def of_letterboxed(
    prototypes: torch.Tensor, coefficients: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]
) -> Iterator[torch.Tensor]:
    """Yield masks of the letterboxed image of `size`, cropped to `boxes`, which are in its pixels."""
    for few, identity, some in _few(prototypes, coefficients, boxes, size):
        yield from ops.process_mask(few, identity, some, size, upsample=True)


def _few(
    prototypes: torch.Tensor, coefficients: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield a few masks' logits, as prototypes of which each mask is just one, and the boxes of these.

    The product is computed once for all, since the number of its rows may decide about the last bit.
    """
    logits = coefficients @ prototypes.float().view(len(prototypes), -1)
    logits = logits.view(-1, *prototypes.shape[1:])
    count = max(1, _PIXELS_AT_ONCE // (size[0] * size[1]))
    for few, some in zip(logits.split(count), boxes.split(count), strict=True):
        yield few, torch.eye(len(few), device=few.device), some
