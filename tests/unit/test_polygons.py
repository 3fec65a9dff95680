"""What is told of a polygon without drawing it."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rvmcv_worker.compute.polygons import area, crosses_itself


def polygon(*points: tuple[float, float]) -> NDArray[np.float32]:
    return np.array(points, np.float32)


@pytest.mark.parametrize(
    ("points", "crosses"),
    [
        (polygon((0, 0), (1, 0), (1, 1), (0, 1)), False),
        (polygon((0, 0), (1, 1), (1, 0), (0, 1)), True),
        (polygon((0, 0), (1, 0), (1, 0), (0, 1), (0, 1)), False),  # a vertex twice
        (polygon((0, 0), (2, 0), (1, 0), (1, 1)), False),  # back on itself
        (polygon((0, 0), (2, 0), (2, 2), (1, 0), (0, 2)), False),  # a vertex on another edge
        (polygon((0, 0), (4, 0), (4, 4), (2, -1), (0, 4)), True),  # a vertex past another edge
        (polygon((0, 0), (1, 0)), False),
        (polygon((0.5, 0.5)), False),
        (polygon(*[(0.25, 0.25)] * 9), False),
        (np.empty((0, 2), np.float32), False),
    ],
)
def test_crossing(points: NDArray[np.float32], crosses: bool) -> None:
    for turned in (points, points[::-1], points[:, ::-1], np.roll(points, 1, axis=0)):
        assert crosses_itself(np.ascontiguousarray(turned)) == crosses


def slowly(points: NDArray[np.float32]) -> bool:
    """The same by every pair, in whole numbers."""
    corners = [(int(x), int(y)) for x, y in points]
    edges = list(zip(corners, corners[1:] + corners[:1], strict=True))

    def side(a: tuple[int, int], b: tuple[int, int], p: tuple[int, int]) -> int:
        return int(np.sign((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])))

    return any(
        side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
        for index, (a, b) in enumerate(edges)
        for c, d in edges[:index]
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=9))
def test_it_finds_what_every_pair_finds(points: list[tuple[float, float]]) -> None:
    assert crosses_itself(polygon(*points)) == slowly(polygon(*points))


def test_a_thousand_points_take_no_time_and_the_worst_not_long() -> None:
    angles = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    radius = 0.3 + 0.05 * np.random.default_rng(0).random(1000)
    outline = np.column_stack([np.cos(angles), np.sin(angles)]) * radius[:, None] + 0.5
    begun_s = time.perf_counter()
    for _ in range(20):
        assert not crosses_itself(outline.astype(np.float32))
    assert time.perf_counter() - begun_s < 1.0
    comb = np.column_stack([np.arange(200_000) % 2, np.linspace(0, 1, 200_000)]).astype(np.float32)
    begun_s = time.perf_counter()
    crosses_itself(comb)
    assert time.perf_counter() - begun_s < 10.0


def test_area() -> None:
    assert area(polygon((0, 0), (2, 0), (2, 3), (0, 3))) == 6.0
    assert area(polygon((0, 0), (1, 1), (0.5, 0.5))) == 0.0
