"""How well one mask fits another: IoU, and the boundary F of DAVIS (Perazzi et al., 2016).

All masks are (height, width) bool, of one size.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

#: How far apart two boundaries may lie and still be one, as a fraction of the image's diagonal.
_TOLERANCE = 0.008


def iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return what two masks share of what they cover together, 0 to 1; two empty ones are equal: 1."""
    shared = np.count_nonzero(mask & truth)
    covered = np.count_nonzero(mask) + np.count_nonzero(truth) - shared
    return shared / covered if covered else 1.0


def boundary_f(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return the harmonic mean of the boundaries' precision and recall, 0 to 1.

    A pixel of one boundary is right when one of the other lies within 0.008 of the image's diagonal, in whole
    pixels, rounded up. The image's edge is no boundary. Where one mask has none, being empty or the whole
    image, the value is 1 for equal masks, else 0. (DAVIS calls an empty mask and a whole image equal.)
    """
    tolerance_px = math.ceil(_TOLERANCE * math.hypot(*mask.shape))
    rows, columns = _around([mask, truth])
    ours, theirs = _boundary(mask[rows, columns]), _boundary(truth[rows, columns])
    if not (ours.any() and theirs.any()):
        return float(np.array_equal(mask, truth))
    # Where one has a pixel within the tolerance of one of the other's, often a small part of a poor mask.
    rows, columns = _shared([ours, theirs], tolerance_px)
    near_ours, near_theirs = ours[rows, columns], theirs[rows, columns]
    right = np.count_nonzero(_distance_to(near_theirs)[near_ours] <= tolerance_px)
    found = np.count_nonzero(_distance_to(near_ours)[near_theirs] <= tolerance_px)
    precision, recall = right / np.count_nonzero(ours), found / np.count_nonzero(theirs)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def box_of(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return the tight box, ``x1, y1, x2, y2``, right and bottom exclusive; of an empty mask zeros."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return left, top, left + width, top + height


def deepest(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return ``x, y`` of the pixel that is furthest from all that is not the mask, the image's edge with it.

    Of several the first, row by row. The mask has a pixel.
    """
    left, top, right, bottom = box_of(mask)
    # A frame of one pixel is outside: beyond a tight box there is nothing of the mask.
    framed = np.pad(mask[top:bottom, left:right].view(np.uint8), 1)
    depth = cv2.distanceTransform(framed, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    y, x = divmod(int(depth.argmax()), framed.shape[1])
    return left + x - 1, top + y - 1


def _around(masks: list[NDArray[np.bool_]]) -> tuple[slice, slice]:
    """Return rows and columns that hold all masks and a pixel around them, so their boundaries whole."""
    boxes = [box_of(mask) for mask in masks if mask.any()] or [(0, 0, 1, 1)]
    left, top, right, bottom = zip(*boxes, strict=True)
    return slice(max(min(top) - 1, 0), max(bottom) + 1), slice(max(min(left) - 1, 0), max(right) + 1)


def _shared(boundaries: list[NDArray[np.bool_]], tolerance_px: int) -> tuple[slice, slice]:
    """Return rows and columns, maybe none, that lie within the tolerance of the boxes of all."""
    left, top, right, bottom = zip(*map(box_of, boundaries), strict=True)
    rows = slice(max(max(top) - tolerance_px, 0), max(min(bottom) + tolerance_px, 0))
    return rows, slice(max(max(left) - tolerance_px, 0), max(min(right) + tolerance_px, 0))


def _boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels that differ from that to the right, that below or that between, as DAVIS does."""
    boundary = np.zeros_like(mask)
    boundary[:, :-1] = mask[:, :-1] != mask[:, 1:]
    boundary[:-1] |= mask[:-1] != mask[1:]
    boundary[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return boundary


def _distance_to(boundary: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return how far each pixel is from the nearest of `boundary`, in pixels; infinitely without one."""
    if not boundary.any():
        return np.full(boundary.shape, np.inf, np.float32)
    elsewhere = (~boundary).view(np.uint8)
    distance: NDArray[np.float32] = cv2.distanceTransform(elsewhere, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance
