"""One `segmentation` of a COCO file, from JSON into something small, and what is wrong with its form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvmcv_worker.compute import rle
from rvmcv_worker.compute.faults import Fault, FaultKind
from rvmcv_worker.compute.rle import Rle, RleError

#: More than any object is seen in.
_MAX_PIECES = 10_000


@dataclass(frozen=True, slots=True)
class Pieces:
    """Polygons in pixels, end to end: an array for each of a million pieces would be mostly overhead."""

    #: (n, 2) float32, x and y.
    points: NDArray[np.float32]
    #: Index at which each piece but the first begins.
    begins: NDArray[np.uint32]

    def polygons(self) -> Sequence[NDArray[np.float32]]:
        """Return the pieces, each (n, 2)."""
        return np.split(self.points, self.begins)


#: What an annotation says of its object's shape; None for a box alone.
Segmentation = Pieces | Rle | Fault | None


def read_segmentation(value: object, max_pixels: int) -> Segmentation:
    """Return what the value means; a `Fault` where it means nothing."""
    if not value:
        return None
    try:
        if isinstance(value, dict):
            return _run_lengths(value, max_pixels)
        if isinstance(value, list):
            return _pieces(value)
    except (RleError, OverflowError, TypeError, ValueError) as error:
        return Fault(FaultKind.SEGMENTATION, str(error))
    return Fault(FaultKind.SEGMENTATION, "neither a list nor an object")


def _run_lengths(value: dict[str, Any], max_pixels: int) -> Rle:
    size, counts = value.get("size"), value.get("counts")
    if not (
        isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    ):
        raise ValueError("'size' is not [height, width]")
    height, width = size
    if height * width > max_pixels:
        raise ValueError(f"run lengths of {width} x {height} pixels, more than the worker takes")
    if isinstance(counts, str):
        return rle.from_string(counts, height, width)
    if isinstance(counts, list):
        return rle.from_list(counts, height, width)
    raise ValueError("'counts' is neither a list nor a string")


def _pieces(value: list[Any]) -> Pieces:
    if len(value) > _MAX_PIECES:
        raise ValueError(f"{len(value)} pieces, more than {_MAX_PIECES}")
    for piece in value:
        if not isinstance(piece, list) or any(type(number) not in {int, float} for number in piece):
            raise ValueError("a polygon is not a list of numbers")
        if len(piece) % 2:
            raise ValueError(f"a polygon of {len(piece)} numbers, which are not pairs of x and y")
    numbers = np.array([number for piece in value for number in piece], np.float64)
    with np.errstate(over="ignore"):  # told as not finite
        points = numbers.astype(np.float32).reshape(-1, 2)
    ends = np.cumsum([len(piece) // 2 for piece in value])
    return Pieces(points, ends[:-1].astype(np.uint32))
