"""Pictures on which a detector is warmed up, timed and compared: drawn, since it brings none of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

#: Width and height of each shape, in parts of the model's image size: square, and as cameras are held.
_SHAPES = ((1.0, 1.0), (1.0, 0.75), (0.75, 1.0))
#: How many are drawn of each shape, and how many of these are kept.
_DRAWN, _KEPT = 4, 2


def pictures(imgsz: int, score: Callable[[Picture], float]) -> list[Picture]:
    """Return the pictures, of those drawn, in which a model sees most; `score` asks it for its best score.

    The same model always gets the same ones. They need no scaling: a pixel of theirs is one of the network's.
    """
    kept: list[Picture] = []
    for width, height in _SHAPES:
        drawn = list(_draw(round(imgsz * width), round(imgsz * height)))
        kept += sorted(drawn, key=score, reverse=True)[:_KEPT]
    return kept


def _draw(width: int, height: int) -> Iterator[Picture]:
    """Draw smooth backgrounds with bright, long and angular things on them, and some noise."""
    random = np.random.default_rng(width * 10_007 + height)
    edge = min(width, height)

    def somewhere() -> tuple[int, int]:
        return int(random.integers(0, width)), int(random.integers(0, height))

    def colour() -> tuple[int, int, int]:
        blue, green, red = (int(value) for value in random.integers(0, 255, 3))
        return blue, green, red

    for _ in range(_DRAWN):
        coarse = random.integers(40, 215, (6, 6, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(6):
            centre, angle = somewhere(), float(random.uniform(0, 180))
            axes = int(random.uniform(0.05, 0.2) * edge), int(random.uniform(0.1, 0.35) * edge)
            cv2.ellipse(picture, centre, axes, angle, 0, 360, colour(), -1, cv2.LINE_AA)
            inner = axes[0] // 2, int(axes[1] * 0.8)
            cv2.ellipse(picture, centre, inner, angle, 0, 360, colour(), -1, cv2.LINE_AA)
            size = tuple(random.uniform(0.1, 0.5, 2) * edge)
            corners = cv2.boxPoints((somewhere(), size, float(random.uniform(0, 90))))
            cv2.fillPoly(picture, [corners.astype(np.int32)], colour(), cv2.LINE_AA)
        noise = random.normal(0, 6, picture.shape)
        yield np.clip(cv2.GaussianBlur(picture, (3, 3), 0) + noise, 0, 255).astype(np.uint8)
