"""Draw a data set of bottles and cans, in YOLO's layout, as a folder or a zip.

    data.yaml   images/{train,val,test}/0000.jpg   labels/{train,val,test}/0000.txt

Labels follow what is visible: tight boxes, or polygons with `segment=True`. Picture i of a split
depends on the seed, the split and i alone, so a larger set holds the smaller one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from rvmcv_worker.demo.scene import Item, Scene, draw_scene
from rvmcv_worker.demo.solids import NAMES

SPLITS = ("train", "val", "test")
JPEG_QUALITY = 90


def box_line(item: Item) -> str:
    """`class x y w h`: the tight box around the visible pixels, relative to the picture."""
    rows, columns = np.nonzero(item.visible)
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    size_px = len(item.visible)
    numbers = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    return " ".join([str(item.class_id), *(f"{number / size_px:.6f}" for number in numbers)])


def polygon_line(item: Item) -> str:
    """`class x1 y1 x2 y2 …`: the outline of what is visible, holes filled, relative to the picture."""
    contours, _ = cv2.findContours(item.visible.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contour = max(contours, key=cv2.contourArea)
    corners = cv2.approxPolyDP(contour, 0.75, closed=True).reshape(-1, 2)
    numbers = (corners + 0.5) / len(item.visible)
    return " ".join([str(item.class_id), *(f"{number:.6f}" for number in numbers.reshape(-1))])


def encode(scene: Scene) -> bytes:
    """The picture as JPEG."""
    bgr = np.ascontiguousarray(scene.picture[..., ::-1])
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return jpeg.tobytes()


def draw_files(
    *, train: int, val: int, test: int, size_px: int, seed: int, segment: bool = False
) -> Iterator[tuple[str, bytes]]:
    """The data set's files one by one: name relative to its top, content."""
    counts = {split: count for split, count in zip(SPLITS, (train, val, test), strict=True) if count}
    splits = "".join(f"{split}: images/{split}\n" for split in counts)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    yield "data.yaml", f"{splits}names:\n{names}".encode()
    line = polygon_line if segment else box_line
    for split, count in counts.items():
        for i in range(count):
            scene = draw_scene(np.random.default_rng([seed, SPLITS.index(split), i]), size_px)
            yield f"images/{split}/{i:04d}.jpg", encode(scene)
            labels = "".join(f"{line(item)}\n" for item in scene.items)
            yield f"labels/{split}/{i:04d}.txt", labels.encode()


def draw_dataset(
    directory: Path, *, train: int, val: int, test: int, size_px: int, seed: int, segment: bool = False
) -> Path:
    """Draw into `directory`, which is made; returns the path of its `data.yaml`."""
    files = draw_files(train=train, val=val, test=test, size_px=size_px, seed=seed, segment=segment)
    for name, content in files:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory / "data.yaml"


def draw_zip(
    path: Path, *, train: int, val: int, test: int, size_px: int, seed: int, segment: bool = False
) -> Path:
    """Draw into a zip at `path`; the same arguments give the same bytes."""
    files = draw_files(train=train, val=val, test=test, size_px=size_px, seed=seed, segment=segment)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            # A fixed date: the archive's sha256 then depends on what is drawn alone.
            archive.writestr(zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0)), content)
    return path
