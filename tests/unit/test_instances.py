"""Objects as polygons and run lengths: what is drawn, what is refused, and that a file keeps them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco

from rvmcv_worker.compute.instances import Instance, LabelledImage, read, write
from rvmcv_worker.compute.rle import Rle, RleError, from_list, from_string


def polygon(*points: tuple[float, float]) -> NDArray[np.float32]:
    return np.array(points, np.float32)


SQUARE = polygon((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75))


def blob(seed: int, height: int = 37, width: int = 53) -> NDArray[np.bool_]:
    noise = np.random.default_rng(seed).random((height, width)).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 3) > 0.5  # type: ignore[no-any-return]


def test_a_pixel_that_the_outline_touches_is_the_objects() -> None:
    assert np.argwhere(Instance(0, (SQUARE,)).mask(4, 8)).tolist() == [
        [y, x] for y in (1, 2, 3) for x in range(2, 7)
    ]


def test_a_polygon_is_drawn_as_ultralytics_draws_it() -> None:
    """As its `polygon2mask` does: cut to whole numbers, then filled."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = rng.random((12, 2)).astype(np.float32)
        theirs = np.zeros((61, 47), np.uint8)
        cv2.fillPoly(theirs, [(points * np.float32((47, 61))).astype(np.int32)], 1)
        assert np.array_equal(Instance(0, (points,)).mask(61, 47), theirs.astype(bool))


def test_an_outlined_mask_comes_back_whole() -> None:
    mask = blob(1)
    outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    pieces = [outline.reshape(-1, 2) for outline in outlines]
    filled = np.zeros(mask.shape, np.uint8)
    for piece in pieces:
        cv2.fillPoly(filled, [piece], 1)
    sides = np.array(mask.shape[::-1])
    drawn = Instance(0, tuple(((piece + 0.5) / sides).astype(np.float32) for piece in pieces))
    assert np.array_equal(drawn.mask(*mask.shape), filled.astype(bool))


def test_pieces_add_up_where_they_overlap() -> None:
    other = SQUARE + np.float32(0.125)
    both = Instance(0, (SQUARE, other)).mask(64, 64)
    assert np.array_equal(both, Instance(0, (SQUARE,)).mask(64, 64) | Instance(0, (other,)).mask(64, 64))


def test_what_a_polygon_goes_around_twice_is_a_hole() -> None:
    angles = np.arange(5) * (4 * np.pi / 5)
    star = polygon(*zip(0.5 + 0.4 * np.sin(angles), 0.5 - 0.4 * np.cos(angles), strict=True))
    mask = Instance(0, (star,)).mask(100, 100)
    assert not mask[50, 50]
    assert mask[20, 50]


def test_a_vertex_far_outside_does_no_harm() -> None:
    far = polygon((0.5, 0.5), (3e38, 0.5), (3e38, 3e38), (0.5, 3e38))
    assert Instance(0, (far,)).mask(10, 10)[5:, 5:].all()


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40))
def test_run_lengths_of_both_kinds_mean_what_pycocotools_means(seed: int, height: int, width: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    packed = coco.encode(np.asfortranarray(mask.view(np.uint8)))["counts"].decode()
    rle = from_string(packed, height, width)
    assert np.array_equal(rle.mask(height, width), mask)
    assert rle.area == mask.sum()
    again = from_list(rle.counts.tolist(), height, width)
    assert np.array_equal(again.counts, rle.counts)


def test_long_runs_are_read() -> None:
    mask = np.zeros((3000, 4000), np.uint8)
    mask[1000:2000, 1500:3700] = 1
    packed = coco.encode(np.asfortranarray(mask))["counts"].decode()
    assert np.array_equal(from_string(packed, 3000, 4000).mask(3000, 4000), mask.astype(bool))


def test_run_lengths_are_resized_to_the_nearest_pixel() -> None:
    mask = blob(2, 30, 50)
    rle = from_string(coco.encode(np.asfortranarray(mask.view(np.uint8)))["counts"].decode(), 30, 50)
    rows, columns = np.arange(10) * 3 + 1, np.arange(100) // 2
    assert np.array_equal(rle.mask(10, 100), mask[np.ix_(rows, columns)])


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        ([10], "run lengths of 10 pixels in all, but 4 x 3 are 12"),
        ([], "run lengths of 0 pixels"),
        ([6, -1, 7], "not a whole number from 0"),
        ([1e1, 2], "not a whole number"),
        ([True, 11], "not a whole number"),
        (["12"], "not a whole number"),
        ([2**64, 12 - 2**64], "not a whole number"),
        ([10**400], "not a whole number"),
        ([None], "not a whole number"),
    ],
)
def test_a_list_that_is_no_mask_is_refused(counts: list[object], why: str) -> None:
    with pytest.raises(RleError, match=why):
        from_list(counts, 3, 4)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "run lengths of 0 pixels"),
        ("55", "run lengths of 10 pixels in all, but 3 x 3"),
        ("<", "above the number of pixels"),
        ("P", "cut off"),
        ("ooooooooooooooo", "cut off"),
        ("oooooooooo0", "more bits"),
        ("oooooo?", "below 0 or above"),
        ("@", "below 0"),
        ("/", "a character"),
        ("\0", "a character"),
        ("9p", "a character"),
        ("é", "a character"),
    ],
)
def test_a_string_that_is_no_mask_is_refused(text: str, why: str) -> None:
    with pytest.raises(RleError, match=why):
        from_string(text, 3, 3)


@given(st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=60))
def test_any_string_is_a_mask_or_refused(text: str) -> None:
    try:
        rle = from_string(text, 5, 7)
    except RleError:
        return
    assert rle.counts.sum() == 35


def test_a_hostile_string_takes_memory_of_its_own_length_only() -> None:
    hostile = "ooooo?" * 100_000
    tracemalloc.start()
    with pytest.raises(RleError):
        from_string(hostile, 100_000, 100_000)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100 * len(hostile)


def test_a_file_keeps_everything_to_the_bit(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(0.5, 0.3, (500, 2)).astype(np.float32)
    rle = Rle(3, 4, np.array([2, 5, 5], np.uint32))
    images = [
        LabelledImage(
            "images/train/é\n.jpg", 20, 30, (Instance(2, (points, points[:3])), Instance(0, rle=rle))
        ),
        LabelledImage("images/train/b.jpg", 1, 1, ()),
    ]
    write(tmp_path / "instances" / "train.jsonl", images)
    again = read(tmp_path / "instances" / "train.jsonl")
    assert [(image.path, image.height, image.width) for image in again] == [
        (image.path, image.height, image.width) for image in images
    ]
    first, second = again[0].instances
    assert (first.class_id, second.class_id, first.rle, second.polygons) == (2, 0, None, ())
    assert all(map(np.array_equal, first.polygons, (points, points[:3])))
    assert first.polygons[0].dtype == np.float32
    assert second.rle is not None
    assert np.array_equal(second.rle.counts, rle.counts)
    assert (second.rle.height, second.rle.width) == (3, 4)
    assert again[1].instances == ()
