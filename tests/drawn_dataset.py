"""A tiny data set, drawn: bright boxes on noise, as boxes or as polygons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["can", "bottle"]


def draw(
    folder: Path, *, polygons: bool = False, images: dict[str, int] | None = None, edge_px: int = 64
) -> Path:
    """Draw `images` per split under `folder`/data, two boxes each; returns the `data.yaml` beside it."""
    random = np.random.default_rng(0)
    images = images or {"train": 16, "val": 6}
    for split, count in images.items():
        for kind in ("images", "labels"):
            (folder / "data" / kind / split).mkdir(parents=True)
        for number in range(count):
            picture = random.integers(0, 90, (edge_px, edge_px, 3), dtype=np.uint8)
            lines = []
            for class_id in range(len(NAMES)):
                x, y = random.uniform(0.2, 0.8, 2)
                w, h = (0.3, 0.2) if class_id else (0.2, 0.3)
                left, right, top, bottom = x - w / 2, x + w / 2, y - h / 2, y + h / 2
                rows = slice(max(int(top * edge_px), 0), int(bottom * edge_px))
                columns = slice(max(int(left * edge_px), 0), int(right * edge_px))
                picture[rows, columns, class_id] = 255
                corners = np.clip([left, top, right, top, right, bottom, left, bottom], 0, 1)
                shape = corners if polygons else (x, y, w, h)
                lines.append(f"{class_id} " + " ".join(f"{value:.5f}" for value in shape))
            Image.fromarray(picture).save(folder / "data" / "images" / split / f"{number:03}.jpg", quality=95)
            (folder / "data" / "labels" / split / f"{number:03}.txt").write_text("\n".join(lines) + "\n")
    return write_yaml(folder, list(images), NAMES)


def write_yaml(folder: Path, splits: list[str], names: list[str]) -> Path:
    """Write `folder`/data.yaml for the data set in `folder`/data as the prepare child does."""
    lines = [f"path: {folder / 'data'}", *(f"{split}: images/{split}" for split in splits), "names:"]
    file = folder / "data.yaml"
    file.write_text("\n".join([*lines, *(f"  {number}: {name}" for number, name in enumerate(names))]) + "\n")
    return file
