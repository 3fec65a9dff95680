"""One picture: background, clutter, bottles and cans in front of each other, light; and what is visible."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from rvmcv_worker.demo.clutter import clutter
from rvmcv_worker.demo.layers import Layer, Shadow, lay
from rvmcv_worker.demo.rendering import Pose, render
from rvmcv_worker.demo.scenery import background, relight
from rvmcv_worker.demo.solids import NAMES, bottle, can

Mask = npt.NDArray[np.bool_]

#: How many objects a picture holds, and how often; 0 is background only.
COUNTS = {0: 0.05, 1: 0.3, 2: 0.35, 3: 0.3}
#: At least this share of an object stays in view: of its whole extent inside the picture and outside.
VISIBLE_SHARE = 0.7
#: How often a place is taken where an object would stand in front of another.
OVERLAPS_ALLOWED = 0.4


@dataclass(frozen=True)
class Item:
    """A bottle or can in a picture; `visible` (size, size) is the part of it that is seen."""

    class_id: int
    visible: Mask
    extent_px: float


@dataclass(frozen=True)
class Scene:
    """`picture` is uint8 RGB, (size, size, 3)."""

    picture: npt.NDArray[np.uint8]
    items: tuple[Item, ...]


def largest_piece(mask: Mask) -> Mask:
    """The largest connected region of the mask, which must not be empty."""
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    largest: Mask = pieces == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    return largest


def behind(items: list[Item], layer: Layer) -> list[Item] | None:
    """The items after `layer` was put before them; None if one would be lost or cut in two."""
    left = []
    for item in items:
        visible = item.visible.copy()
        visible[layer.window] &= layer.cover <= 0.5
        if visible.sum() < item.visible.sum():
            if visible.sum() < VISIBLE_SHARE * item.extent_px:
                return None
            # Neither a box nor a polygon describes two pieces well; a few stray pixels do no harm.
            piece = largest_piece(visible)
            if piece.sum() < 0.97 * visible.sum():
                return None
            visible = piece
        left.append(Item(item.class_id, visible, item.extent_px))
    return left


def random_pose(rng: np.random.Generator, size_px: int, class_id: int, count: int) -> Pose:
    """Mostly upright or a little askew, else at any angle; smaller in company."""
    low, high = {"bottle": (0.48, 0.9), "can": (0.28, 0.55)}[NAMES[class_id]]
    height = rng.uniform(low, low + (high - low) * (1.0 if count == 1 else 0.6))
    rotation = rng.normal(0, 0.17) if rng.random() < 0.94 else rng.uniform(-np.pi, np.pi)
    x, y = rng.uniform(0.12, 0.88, 2) * size_px
    return Pose(float(x), float(y), height * size_px, rotation)


def draw_scene(rng: np.random.Generator, size_px: int) -> Scene:
    """Draw one picture of `size_px`²; equal generators draw equal pictures."""
    picture = background(rng, size_px)
    light_rad = rng.uniform(-np.pi, 0)
    offset_px = round(-8 * np.cos(light_rad) * size_px / 320), round(5 * size_px / 320)
    shadow = Shadow(offset_px, rng.uniform(3, 9) * size_px / 320, rng.uniform(0.15, 0.45))

    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(0, size_px, 2)
        lay(picture, clutter(rng, size_px, (float(x), float(y))), shadow)

    items: list[Item] = []
    count = int(rng.choice(list(COUNTS), p=list(COUNTS.values())))
    for _ in range(count * 6):  # a place that hides too much of an earlier object is refused
        if len(items) == count:
            break
        class_id = int(rng.integers(len(NAMES)))
        solid = (bottle, can)[class_id](rng)
        pose = random_pose(rng, size_px, class_id, count)
        layer = render(solid, pose, size_px, light_rad)
        visible = np.zeros((size_px, size_px), np.bool_)
        visible[layer.window] = layer.cover > 0.5
        extent_px = 2 * float(solid.radii.mean()) * pose.height**2
        overlaps = any((item.visible & visible).any() for item in items)
        if overlaps and rng.random() > OVERLAPS_ALLOWED:
            continue
        left = behind(items, layer)
        if left is not None and visible.sum() >= VISIBLE_SHARE * extent_px:
            items = [*left, Item(class_id, visible, extent_px)]
            lay(picture, layer, shadow)

    if items and rng.random() < 0.25:
        rows, columns = np.nonzero(items[rng.integers(len(items))].visible)
        at = rng.integers(len(rows))
        layer = clutter(rng, size_px, (float(columns[at]), float(rows[at])))
        left = behind(items, layer)
        if left is not None:
            items = left
            lay(picture, layer, shadow)

    picture = relight(rng, picture)
    return Scene((picture * 255 + 0.5).astype(np.uint8), tuple(items))
