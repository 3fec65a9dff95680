"""What can be told of a polygon without drawing it; vertices are (n, 2) float32, x and y."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Pairs of edges that are compared at most: an outline of a thousand points has some 5,000 that come near
#: each other; a polygon of more pairs than this was made to take long.
_MAX_PAIRS = 500_000


def area(points: NDArray[np.float32]) -> float:
    """Return what a polygon covers, in units of its coordinates; the two halves of an eight cancel out."""
    x, y = points.astype(np.float64).T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def crosses_itself(points: NDArray[np.float32]) -> bool:
    """Whether two edges of a polygon cross; to touch, or to run back on itself, is not to cross.

    Edges are sorted along the longer way and each is held only against those that begin before it ends.
    """
    start = points.astype(np.float64)
    start = start[np.any(start != np.roll(start, 1, axis=0), axis=1)]
    if len(start) < 4:
        return False
    axis = int(np.argmax(np.ptp(start, axis=0)))
    end = np.roll(start, -1, axis=0)
    low, high = np.minimum(start, end), np.maximum(start, end)
    order = np.argsort(low[:, axis], kind="stable")
    start, end, low, high = start[order], end[order], low[order], high[order]
    index = np.arange(len(start))
    near = np.searchsorted(low[:, axis], high[:, axis], side="left") - index - 1
    near = np.maximum(near, 0)
    until = int(np.searchsorted(np.cumsum(near), _MAX_PAIRS, side="right"))
    near = near[:until]
    first = np.repeat(index[:until], near)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(near) - near, near)
    other = 1 - axis
    meet = (low[first, other] < high[second, other]) & (low[second, other] < high[first, other])
    first, second = first[meet], second[meet]
    a, b, c, d = start[first], end[first], start[second], end[second]
    return bool(np.any((_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)))


def _side(a: NDArray[np.float64], b: NDArray[np.float64], point: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return on which side of the line from `a` to `b` each point lies: -1, 1, or 0 where it is on it."""
    along, to = b - a, point - a
    return np.sign(along[:, 0] * to[:, 1] - along[:, 1] * to[:, 0])
