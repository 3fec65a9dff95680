"""A split drawn for the tests of SAM2's training: bright objects on dark noise, labelled with polygons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rvmcv_worker.compute.instances import Instance, LabelledImage

#: left, top, right, bottom as fractions of the sides.
Box = tuple[float, float, float, float]


def instance(box: Box, class_id: int = 0) -> Instance:
    left, top, right, bottom = box
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], np.float32)
    return Instance(class_id, (corners,))


def draw(seed: int, size: tuple[int, int], boxes: Sequence[Box]) -> NDArray[np.uint8]:
    """Return (height, width, 3) for a (width, height)."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 60, (height, width, 3), dtype=np.uint8)
    for left, top, right, bottom in boxes:
        pixels[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] += (
            180
        )
    return pixels


def save(
    data: Path, name: str, pixels: NDArray[np.uint8], boxes: Sequence[Box], *, orientation: int = 1
) -> LabelledImage:
    """Write an image, stored as EXIF's `orientation` has it turned, and return it as it is labelled."""
    path = data / "images" / "train" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {1: pixels, 6: np.rot90(pixels)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    height, width = pixels.shape[:2]
    return LabelledImage(f"images/train/{name}", height, width, tuple(instance(box) for box in boxes))


def split(data: Path, counts: Sequence[int]) -> list[LabelledImage]:
    """Write an image for each number of objects, of different sizes, in PNG; return them labelled."""
    labelled = []
    for number, count in enumerate(counts):
        dice = np.random.default_rng(number)
        corners = dice.uniform(0, 0.6, (count, 2))
        boxes = [(float(x), float(y), float(x) + 0.35, float(y) + 0.3) for x, y in corners]
        pixels = draw(number, (90 + 6 * number, 60 + 10 * number), boxes)
        labelled.append(save(data, f"{number:03d}.png", pixels, boxes))
    return labelled
