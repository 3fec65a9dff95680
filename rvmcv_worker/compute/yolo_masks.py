"""The masks of a YOLO11-seg model itself, made a few at a time: 300 of 12 megapixels are 3.6 GB of bytes.

Call `ultralytics_env.isolate` first: this module imports Ultralytics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from ultralytics.utils import ops

#: Pixels of the masks that are made at once.
_PIXELS_AT_ONCE = 32_000_000


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
    product = coefficients @ prototypes.float().view(len(prototypes), -1)
    logits = product.view(-1, *prototypes.shape[1:])
    count = max(1, _PIXELS_AT_ONCE // (size[0] * size[1]))
    for start in range(0, len(logits), count):
        few = logits[start : start + count]
        yield few, torch.eye(len(few), device=few.device), boxes[start : start + count]
