"""Things laid over a picture one by one, each with the shadow that it casts on what lies beneath.

Pictures are float32 RGB in 0..1, shape (size, size, 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from rvmcv_worker.demo.artwork import Array, blend


@dataclass(frozen=True)
class Layer:
    """Pixels to lay over a picture, for the rows and columns that `window` names.

    `rgb` (h, w, 3) and `opacity` (h, w) in 0..1; `cover` (h, w) is the share of each pixel inside
    the outline: 1 on clear glass too, where `opacity` is low.
    """

    window: tuple[slice, slice]
    rgb: Array
    opacity: Array
    cover: Array


@dataclass(frozen=True)
class Shadow:
    """How light falls in one picture: the shadow's offset and blur in pixels, and its depth in 0..1."""

    offset_px: tuple[int, int]
    softness_px: float
    depth: float


def around(x: float, y: float, reach: float, size_px: int) -> tuple[slice, slice]:
    """The part of the square with this centre and half side that lies in the picture; maybe empty."""
    top, bottom = max(0, int(y - reach)), min(size_px, int(y + reach) + 1)
    left, right = max(0, int(x - reach)), min(size_px, int(x + reach) + 1)
    return slice(top, max(top, bottom)), slice(left, max(left, right))


def lay(picture: Array, layer: Layer, shadow: Shadow) -> None:
    """Lay `layer` and its shadow over `picture`, in place."""
    rows, columns = layer.window
    margin = int(3 * shadow.softness_px + max(abs(step) for step in shadow.offset_px))
    top, left = max(0, rows.start - margin), max(0, columns.start - margin)
    beneath = picture[top : rows.stop + margin, left : columns.stop + margin]
    cover = np.zeros(beneath.shape[:2], np.float32)
    cover[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = layer.cover
    shift = np.array([[1, 0, shadow.offset_px[0]], [0, 1, shadow.offset_px[1]]], np.float32)
    moved = cv2.warpAffine(cover, shift, cover.shape[::-1])
    beneath *= (1 - shadow.depth * cv2.GaussianBlur(moved, (0, 0), shadow.softness_px))[..., None]
    picture[layer.window] = blend(picture[layer.window], layer.rgb, layer.opacity)
