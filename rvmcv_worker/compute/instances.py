"""The labelled objects of a set of images, each as polygons or run lengths, and the file they are kept in.

One JSON line an image: a split of any size is read without a parser's tree of the whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvmcv_worker.compute.rle import Rle

#: Digits with which a float32 is the same when read again.
_FLOAT32_DIGITS = 9
#: How far outside an image a vertex may lie when it is drawn, in sides: OpenCV counts in 32 bits.
_MAX_OUTSIDE = 4.0


@dataclass(frozen=True, slots=True)
class Instance:
    """One object of an image: polygons, or run lengths."""

    class_id: int
    #: Each (n, 2) float32, x and y as fractions of the image's sides; several are one object in pieces.
    polygons: tuple[NDArray[np.float32], ...] = ()
    #: Of the upright image, at whatever size it was drawn.
    rle: Rle | None = None

    def mask(self, height: int, width: int) -> NDArray[np.bool_]:
        """Return the object as a (height, width) mask, drawn at that size; it may be empty.

        A vertex belongs to the pixel that it lies in, and a pixel that a polygon's edge goes through is the
        object's: to the pixel what Ultralytics' `polygon2mask` makes, and what was outlined with
        `cv2.findContours` comes back whole. Pieces add up. A polygon that crosses itself is filled by the
        even-odd rule, as there and in COCO's tools: what it goes around twice is a hole.
        """
        if self.rle is not None:
            return self.rle.mask(height, width)
        import cv2  # a preparation for YOLO11 draws nothing, and starts without it

        canvas = np.zeros((height, width), np.uint8)
        for polygon in self.polygons:
            vertices = np.clip(polygon, -_MAX_OUTSIDE, _MAX_OUTSIDE) * np.array((width, height), np.float32)
            cv2.fillPoly(canvas, [np.floor(vertices).astype(np.int32)], 1)
        return canvas.view(np.bool_)


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image of a split and what is labelled on it; without instances it is background."""

    #: Relative to ``prepare/data``, as ``images/train/a.jpg``.
    path: str
    #: Pixels of the upright image, as `image_decode.decode` returns it.
    height: int
    width: int
    instances: tuple[Instance, ...]


def write(path: Path, images: Iterable[LabelledImage]) -> None:
    """Write a split's images, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii") as file:
        for image in images:
            line = {
                "path": image.path,
                "height": image.height,
                "width": image.width,
                "instances": [_to_json(instance) for instance in image.instances],
            }
            file.write(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n")


def read(path: Path) -> list[LabelledImage]:
    """Return what `write` wrote, equal to the bit."""
    with path.open(encoding="ascii") as file:
        lines = map(json.loads, file)
        return [
            LabelledImage(
                path=line["path"],
                height=line["height"],
                width=line["width"],
                instances=tuple(_from_json(found) for found in line["instances"]),
            )
            for line in lines
        ]


def _to_json(instance: Instance) -> dict[str, Any]:
    if instance.rle is not None:
        rle = instance.rle
        return {
            "class_id": instance.class_id,
            "rle": {"size": [rle.height, rle.width], "counts": rle.counts.tolist()},
        }
    return {
        "class_id": instance.class_id,
        "polygons": [
            [float(f"{number:.{_FLOAT32_DIGITS}g}") for number in polygon.ravel().tolist()]
            for polygon in instance.polygons
        ],
    }


def _from_json(found: dict[str, Any]) -> Instance:
    if rle := found.get("rle"):
        height, width = rle["size"]
        return Instance(found["class_id"], rle=Rle(height, width, np.array(rle["counts"], np.uint32)))
    polygons = (np.array(numbers, np.float32).reshape(-1, 2) for numbers in found["polygons"])
    return Instance(found["class_id"], tuple(polygons))
