"""Drawn pictures: of what size, and whether what was found is on them where it is."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from rvmcv_worker.compute import annotate

NAMES = [
    "PET_bottle",
    "a class name that is so long that somebody must have made it up",
    "Ünïcødé Ж 瓶",
    "tab\tline\n\u202ebidi \ud800",
    "",
]


def _image(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 128, np.uint8)


def _drawn(
    image: NDArray[np.uint8],
    boxes: list[tuple[float, ...]],
    *,
    scores: list[float] | None = None,
    classes: list[int] | None = None,
    masks: list[NDArray[np.bool_]] | None = None,
) -> NDArray[np.uint8]:
    """Return the picture as a viewer decodes it."""
    count = len(boxes)
    jpeg = annotate.draw(
        image,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores or [0.5] * count, np.float32),
        np.array(classes or [0] * count, np.int64),
        NAMES,
        None if masks is None else iter(masks),
    )
    assert jpeg.startswith(b"\xff\xd8\xff")
    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    return picture


def _changed(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return where something was drawn on a grey image."""
    return (np.abs(picture.astype(int) - 128) > 24).any(axis=2)


@pytest.mark.parametrize(
    ("height", "width", "drawn"),
    [
        (64, 48, (640, 480)),
        (640, 480, (640, 480)),
        (1080, 1920, (1080, 1920)),
        (6000, 8000, (3072, 4096)),
        (1, 1, (640, 640)),
        (3, 60_000, (1, 4096)),
        (60_000, 3, (4096, 1)),
    ],
)
def test_the_picture_is_neither_too_small_nor_too_large(
    height: int, width: int, drawn: tuple[int, int]
) -> None:
    mask = np.zeros((height, width), bool)
    mask[height // 2 :] = True
    box = (0.0, height / 2, width, height)
    assert _drawn(_image(height, width), [box], masks=[mask]).shape == (*drawn, 3)


@pytest.mark.parametrize("edge_px", [64, 1000, 8000])
def test_box_and_mask_lie_where_they_were_found(edge_px: int) -> None:
    quarter, half = edge_px // 4, edge_px // 2
    mask = np.zeros((edge_px, edge_px), bool)
    mask[half : half + quarter, half : half + quarter] = True
    box = (half, half, half + quarter, half + quarter)
    picture = _drawn(_image(edge_px, edge_px), [box], masks=[mask])
    edge = len(picture)
    changed = _changed(picture)
    margin = edge // 50
    inside = np.s_[edge // 2 + margin : edge * 3 // 4 - margin, edge // 2 + margin : edge * 3 // 4 - margin]
    assert changed[inside].mean() > 0.99, "the mask"
    assert not changed[: edge // 3].any(), "above its label"
    assert not changed[edge * 3 // 4 + margin :].any(), "below"
    assert not changed[:, : edge // 2 - margin].any(), "to its left"


def test_an_image_without_detections_stays_as_it_is_and_the_given_one_too() -> None:
    image = _image(700, 900)
    assert not _changed(_drawn(image, [])).any()
    assert not _changed(_drawn(image, [], masks=[])).any()
    _drawn(image, [(10, 10, 500, 500)], masks=[np.ones((700, 900), bool)])
    assert (image == 128).all()


@pytest.mark.parametrize("name", range(len(NAMES)))
@pytest.mark.parametrize(
    "corner",
    [(0, 0, 20, 20), (880, 0, 900, 20), (0, 680, 20, 700), (880, 680, 900, 700)],
)
def test_a_label_is_inside_the_picture_at_every_corner(name: int, corner: tuple[float, ...]) -> None:
    """A label that is cut off at an edge would show less of itself than in the middle."""

    def label_px(box: tuple[float, ...]) -> int:
        picture = _drawn(_image(700, 900), [box], classes=[name])
        left, top, right, bottom = (int(edge) for edge in box)
        changed = _changed(picture)
        changed[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = False
        return int(changed.sum())

    if corner[1] == 0:  # the label covers its box there
        assert label_px(corner) > 0
    else:
        assert label_px(corner) > 0.8 * label_px((400, 340, 420, 360))


def test_many_detections_are_all_drawn_and_only_the_best_are_named() -> None:
    dice = np.random.default_rng(0)
    corners = [(40 + 60 * (n % 20), 40 + 60 * (n // 20)) for n in range(300)]
    boxes = [(x, y, x + 30, y + 30) for x, y in corners]
    scores = dice.permutation(np.linspace(0.1, 0.99, 300)).tolist()
    changed = _changed(_drawn(_image(1000, 1300), boxes, scores=scores))
    assert all(changed[y + 15, x - 2 : x + 3].any() for x, y in corners)
    few = _changed(_drawn(_image(1000, 1300), boxes[:30], scores=scores[:30]))
    assert changed.sum() < 10 * few.sum()


def test_masks_are_taken_one_by_one() -> None:
    seen: list[weakref.ref[NDArray[np.bool_]]] = []
    alive: list[int] = []

    def masks() -> Iterator[NDArray[np.bool_]]:
        for _ in range(20):
            alive.append(sum(ref() is not None for ref in seen))
            mask = np.ones((100, 100), bool)
            seen.append(weakref.ref(mask))
            yield mask
            del mask

    boxes = np.tile(np.array([0, 0, 100, 100], np.float32), (20, 1))
    annotate.draw(_image(100, 100), boxes, np.ones(20, np.float32), np.zeros(20, np.int64), NAMES, masks())
    assert len(seen) == 20
    assert max(alive) <= 1, "the one before, at most"


def test_the_best_lies_on_top() -> None:
    box = (100.0, 100.0, 600.0, 600.0)
    best_first, best_last = (
        _drawn(_image(700, 700), [box, box], scores=scores, classes=classes)
        for scores, classes in (([0.9, 0.3], [0, 1]), ([0.3, 0.9], [1, 0]))
    )
    np.testing.assert_array_equal(best_first, best_last)
    alone = _drawn(_image(700, 700), [box], scores=[0.9], classes=[0])
    np.testing.assert_array_equal(best_first[300:400, 95:105], alone[300:400, 95:105])


def test_pure_noise_stays_within_what_can_be_sent() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), dtype=np.uint8)
    jpeg = annotate.draw(
        noise, np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, np.int64), NAMES, None
    )
    # A picture has at most four times as many pixels.
    assert 4 * len(jpeg) < 32_000_000
