"""Masks in every format, read back by other libraries than those that wrote them where there are any."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from rvmcv_worker.compute import masks
from rvmcv_worker.engine_wire import MaskFormat

HEIGHT, WIDTH = 61, 83


def _blank() -> NDArray[np.bool_]:
    return np.zeros((HEIGHT, WIDTH), bool)


def _of(*boxes: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    mask = _blank()
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def _ring() -> NDArray[np.bool_]:
    mask = _of((10, 10, 50, 50))
    mask[20:40, 20:40] = False
    mask[28:32, 28:32] = True  # an island in the hole
    return mask


def _bottle() -> NDArray[np.bool_]:
    """Return an object with a curved, uneven outline in a picture of 1080 x 810."""
    mask = np.zeros((1080, 810), np.uint8)
    cv2.ellipse(mask, (400, 560), (130, 380), 12, 0, 360, 1, -1)
    cv2.rectangle(mask, (440, 110), (510, 260), 1, -1)
    return mask.astype(bool)


MASKS = {
    "empty": _blank(),
    "one pixel": _of((40, 30, 41, 31)),
    "first pixel": _of((0, 0, 1, 1)),
    "last pixel": _of((WIDTH - 1, HEIGHT - 1, WIDTH, HEIGHT)),
    "two pixels": _of((5, 5, 7, 6)),
    "a row": _of((0, 7, WIDTH, 8)),
    "a column": _of((9, 0, 10, HEIGHT)),
    "whole image": ~_blank(),
    "islands": _of((0, 0, 3, 3), (20, 10, 60, 40), (80, 58, 83, 61)),
    "touching by a corner": _of((10, 10, 20, 20), (20, 20, 30, 30)),
    "hole": _ring(),
    "noise": np.random.default_rng(0).random((HEIGHT, WIDTH)) > 0.5,
    "bottle": _bottle(),
    "one wide": np.ones((1, 300), bool),
    "two high": np.eye(2, 300, dtype=bool),
    "two wide": np.eye(300, 2, dtype=bool),
    "one pixel in all": np.ones((1, 1), bool),
}


def _read_png(text: str) -> NDArray[np.bool_]:
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    assert image.mode == "1", "one bit a pixel"
    return np.asarray(image)


def _read_polygon(polygons: list[list[int]], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    canvas = np.zeros(shape, np.uint8)
    cv2.fillPoly(canvas, [np.array(polygon, np.int32).reshape(-1, 2) for polygon in polygons], 1)
    return canvas.astype(bool)


def _without_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the mask with all that its border encloses, by what cannot be reached from outside."""
    around = np.pad(mask, 1).astype(np.uint8)
    cv2.floodFill(around, None, (0, 0), 2)
    return around[1:-1, 1:-1] != 2


@pytest.fixture(params=MASKS)
def mask(request: pytest.FixtureRequest) -> NDArray[np.bool_]:
    return MASKS[request.param]


def _encoded(mask: NDArray[np.bool_], mask_format: MaskFormat) -> Any:
    """Return the value as it comes out of a result's JSON."""
    return json.loads(json.dumps(masks.encode(mask, mask_format)))


def test_a_png_is_the_whole_image(mask: NDArray[np.bool_]) -> None:
    np.testing.assert_array_equal(_read_png(_encoded(mask, MaskFormat.PNG)), mask)


def test_a_cropped_png_put_at_its_offset_is_the_mask(mask: NDArray[np.bool_]) -> None:
    value = _encoded(mask, MaskFormat.PNG_CROP)
    (left, top), (width, height) = value["offset"], value["size"]
    crop = _read_png(value["png"])
    assert crop.shape == (height, width)
    whole = np.zeros_like(mask)
    whole[top : top + height, left : left + width] = crop
    np.testing.assert_array_equal(whole, mask)
    if mask.any():
        edges = (crop[0], crop[-1], crop[:, 0], crop[:, -1])
        assert all(edge.any() for edge in edges), "no wider than the mask"
    else:
        assert value["size"] == [1, 1]


# pycocotools' decoder, which the worker has no use for, is older than NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_rle_is_what_coco_reads(mask: NDArray[np.bool_]) -> None:
    value = _encoded(mask, MaskFormat.RLE)
    assert value["size"] == list(mask.shape)
    np.testing.assert_array_equal(coco.decode(value).astype(bool), mask)


def test_polygons_filled_are_the_mask_without_its_holes(mask: NDArray[np.bool_]) -> None:
    polygons = _encoded(mask, MaskFormat.POLYGON)
    assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)
    np.testing.assert_array_equal(_read_polygon(polygons, mask.shape), _without_holes(mask))


def test_each_island_is_a_polygon_and_an_empty_mask_has_none() -> None:
    assert len(_encoded(MASKS["islands"], MaskFormat.POLYGON)) == 3
    assert len(_encoded(MASKS["hole"], MaskFormat.POLYGON)) == 1
    assert _encoded(MASKS["empty"], MaskFormat.POLYGON) == []


@pytest.mark.parametrize("mask_format", MaskFormat)
def test_a_view_into_other_masks_is_written_as_its_copy(mask_format: MaskFormat) -> None:
    stack = np.stack([MASKS["hole"], MASKS["noise"]], axis=-1)
    assert masks.encode(stack[..., 0], mask_format) == masks.encode(MASKS["hole"], mask_format)
    flipped = MASKS["hole"][:, ::-1]
    assert masks.encode(flipped, mask_format) == masks.encode(flipped.copy(), mask_format)


def test_the_formats_are_as_small_as_promised() -> None:
    bytes_ = {form: len(json.dumps(masks.encode(MASKS["bottle"], form))) for form in MaskFormat}
    assert bytes_[MaskFormat.RLE] < 1_100
    assert bytes_[MaskFormat.PNG_CROP] < bytes_[MaskFormat.PNG] < 4_500
