"""What lies about and is neither bottle nor can: cartons, balls, discs, bags, sticks, scraps of paper."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from rvmcv_worker.demo.artwork import Array, artwork, colour
from rvmcv_worker.demo.layers import Layer, around
from rvmcv_worker.demo.scenery import noise

#: Kind -> how many corners its outline has; 0 is round.
CORNERS = {"carton": 4, "ball": 0, "disc": 0, "bag": 9, "stick": 4, "scrap": 5}


def corners_of(rng: np.random.Generator, kind: str, reach: float, turn: float) -> npt.NDArray[np.float64]:
    """The outline's corners around (0, 0) in pixels, (n, 2)."""
    count = CORNERS[kind]
    angles = (np.arange(count) + 0.5) * 2 * np.pi / count
    radii = reach * (np.ones(count) if count == 4 else rng.uniform(0.5, 1.2, count))
    width, height = {"carton": (1, rng.uniform(0.6, 1.5)), "stick": (rng.uniform(1.5, 4), 0.09)}.get(
        kind, (1, 1)
    )
    local = np.stack([radii * np.cos(angles) * width, radii * np.sin(angles) * height])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    turned: npt.NDArray[np.float64] = (rotation @ local).T
    return turned


def clutter(rng: np.random.Generator, size_px: int, centre: tuple[float, float]) -> Layer:
    """One thing of random kind, size and colour around `centre` (x, y in pixels)."""
    x, y = centre
    reach, turn = rng.uniform(0.04, 0.13) * size_px, rng.uniform(0, 2 * np.pi)
    kind = str(rng.choice(list(CORNERS)))
    window = around(x, y, reach * (4 if kind == "stick" else 1.6) + 2, size_px)
    rows, columns = np.mgrid[window].astype(np.float32)
    rows, columns = rows - np.float32(y), columns - np.float32(x)

    cover = np.zeros(rows.shape, np.float32)
    origin = np.array([x - window[1].start, y - window[0].start])
    if CORNERS[kind]:
        points = np.round((corners_of(rng, kind, reach, turn) + origin) * 16).astype(np.int32)
        cv2.fillPoly(cover, [points], 1.0, cv2.LINE_AA, 4)
    else:
        cover = (reach * 0.8 - np.hypot(columns, rows) + 0.5).clip(0, 1)
    if kind == "carton":
        rgb = artwork(rng)(rows / (2 * reach) + 0.5, columns / reach)
    else:
        rgb = np.broadcast_to(colour(rng, saturation=(0.0, 0.9), value=(0.2, 1.0)), (*rows.shape, 3))
    shade = 1 - (0.15 / reach) * (columns * np.float32(np.cos(turn)) + rows * np.float32(np.sin(turn)))
    if kind == "ball":
        shade = shade + 0.35 - (0.5 / reach) * np.hypot(columns + reach * 0.25, rows + reach * 0.25)
    elif kind == "bag":
        shade = shade + 0.3 * noise(rng, rows.shape, 8)
    lit: Array = (rgb * shade[..., None]).clip(0, 1)
    return Layer(window, lit, cover, cover)
