from __future__ import annotations

import itertools
import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from rvmcv_worker.compute import mask_metrics

Mask = NDArray[np.bool_]


def plain_boundary(mask: Mask) -> list[tuple[int, int]]:
    """DAVIS' own way, pixel by pixel: what is beyond the image's edge is like the pixel itself."""
    height, width = mask.shape
    found = []
    for y, x in itertools.product(range(height), range(width)):
        others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        if any(mask[v, u] != mask[y, x] for v, u in others if v < height and u < width):
            found.append((y, x))
    return found


def plain_boundary_f(mask: Mask, truth: Mask) -> float:
    tolerance = math.ceil(0.008 * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2))
    ours, theirs = plain_boundary(mask), plain_boundary(truth)

    def near(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        hits = [
            any((y - v) ** 2 + (x - u) ** 2 <= tolerance**2 for v, u in others)  # in whole numbers
            for y, x in some
        ]
        return sum(hits) / len(some)

    if not ours or not theirs:
        return float((mask == truth).all())
    precision, recall = near(ours, theirs), near(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blobs(rng: np.random.Generator, size: tuple[int, int], share: float = 0.5) -> Mask:
    """Smooth noise cut at a height: islands, holes, pieces that touch the edge."""
    noise = cv2.GaussianBlur(rng.random(size).astype(np.float32), (0, 0), rng.uniform(0.5, 5))
    return noise > np.quantile(noise, 1 - share)


def disc(size: tuple[int, int], x: float, y: float, radius: float) -> Mask:
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


@pytest.mark.parametrize("seed", range(16))
def test_both_metrics_are_those_of_a_plain_implementation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(1, 24)), int(rng.integers(1, 260)))
    truth = blobs(rng, size, rng.uniform(0.01, 0.4))
    # The same, shaken: what it shares and what not is a matter of a few pixels, as in a prediction.
    mask = np.roll(truth, rng.integers(-4, 5, 2), (0, 1)) ^ blobs(rng, size, 0.02)

    assert mask_metrics.boundary_f(mask, truth) == plain_boundary_f(mask, truth)
    both = sum(bool(a and b) for a, b in zip(mask.flat, truth.flat, strict=True))
    either = sum(bool(a or b) for a, b in zip(mask.flat, truth.flat, strict=True))
    assert mask_metrics.iou(mask, truth) == (both / either if either else 1.0)


@pytest.mark.parametrize("apart", [0, 1, 2, 3, 8, 30])
def test_masks_that_hardly_touch_are_measured_by_what_is_near(apart: int) -> None:
    left, right = np.zeros((40, 90), bool), np.zeros((40, 90), bool)
    left[10:20, 10:20] = True
    right[8:21, 20 + apart : 33 + apart] = True

    for some in ((left, right), (right, left), (left.T, right.T), (right.T, left.T)):
        assert mask_metrics.boundary_f(*some) == plain_boundary_f(*some)


@pytest.mark.parametrize("corner", [(0, 0), (0, 90), (60, 0), (60, 90)])
def test_a_boundary_at_the_edge_of_the_image_is_measured_as_one_in_the_middle(
    corner: tuple[int, int],
) -> None:
    truth, mask = np.zeros((70, 100), bool), np.zeros((70, 100), bool)
    y, x = corner
    truth[y : y + 10, x : x + 10] = True
    mask[max(y - 3, 0) : y + 8, max(x - 2, 0) : x + 9] = True

    assert mask_metrics.boundary_f(mask, truth) == plain_boundary_f(mask, truth)


def test_a_shift_within_the_tolerance_costs_nothing_and_one_beyond_it_does() -> None:
    size = (480, 640)  # a diagonal of 800: a tolerance of 6.4 px, of 7 in whole ones
    truth = np.zeros(size, bool)
    truth[100:300, 100:400] = True

    def shifted(px: int) -> float:
        return mask_metrics.boundary_f(np.roll(truth, px, 1), truth)

    assert shifted(0) == shifted(7) == 1.0
    # The upright sides, 200 px each of some 1,000, are too far away now; lying ones are still close.
    assert 0.6 < shifted(8) < 0.7


def test_a_boundary_f_knows_a_circle_from_its_square() -> None:
    truth = disc((400, 400), 200, 200, 100)
    square = np.zeros((400, 400), bool)
    square[100:301, 100:301] = True

    assert mask_metrics.iou(square, truth) == pytest.approx(math.pi / 4, abs=0.01)
    assert mask_metrics.boundary_f(square, truth) < 0.5
    assert mask_metrics.boundary_f(disc((400, 400), 200, 200, 97), truth) == 1.0


@pytest.mark.parametrize("measure", [mask_metrics.iou, mask_metrics.boundary_f])
def test_empty_masks_equal_each_other_and_nothing_else(measure: object) -> None:
    assert callable(measure)
    empty, full = np.zeros((20, 30), bool), np.ones((20, 30), bool)
    some = disc((20, 30), 10, 10, 4)

    assert measure(empty, empty) == measure(full, full) == 1
    assert measure(empty, some) == measure(some, empty) == 0
    assert measure(empty, full) == measure(full, empty) == 0


def test_of_half_an_image_there_is_a_boundary_only_in_its_middle() -> None:
    left = np.zeros((50, 100), bool)
    left[:, :50] = True

    assert mask_metrics.boundary_f(left, ~left) == 1.0
    assert mask_metrics.iou(left, ~left) == 0


def test_the_tight_box_ends_behind_the_last_pixel() -> None:
    mask = np.zeros((20, 30), bool)
    assert mask_metrics.box_of(mask) == (0, 0, 0, 0)
    mask[3, 5] = mask[8, 29] = True
    assert mask_metrics.box_of(mask) == (5, 3, 30, 9)


@pytest.mark.parametrize("seed", range(5))
def test_the_deepest_pixel_is_as_far_from_the_outside_as_any(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = blobs(rng, (24, 40), rng.uniform(0.05, 0.9))

    framed = np.pad(mask, 1)
    outside = np.argwhere(~framed)
    depths = {
        (x - 1, y - 1): min((y - v) ** 2 + (x - u) ** 2 for v, u in outside) for y, x in np.argwhere(framed)
    }
    x, y = mask_metrics.deepest(mask)
    assert mask[y, x]
    assert depths[x, y] == max(depths.values())


def test_a_click_lies_in_the_middle_of_a_disc_and_of_a_whole_image() -> None:
    assert mask_metrics.deepest(disc((200, 300), 120, 80, 40)) == (120, 80)
    assert mask_metrics.deepest(np.ones((31, 41), bool))[1] == 15
    single = np.zeros((5, 5), bool)
    single[4, 0] = True
    assert mask_metrics.deepest(single) == (0, 4)
