"""Data sets in COCO's format, drawn for the tests of the prepare child."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tests.dataset_fixtures import draw

#: Width and height of a drawn picture.
SIZE = (48, 32)
TRIANGLE = [4.0, 4.0, 40.0, 4.0, 20.0, 28.0]
CATEGORIES = [{"id": 1, "name": "bottle"}, {"id": 7, "name": "can"}]


def image(image_id: Any, name: str, **changed: Any) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "width": SIZE[0], "height": SIZE[1], **changed}


def annotation(image_id: Any, segmentation: Any = (TRIANGLE,), **changed: Any) -> dict[str, Any]:
    found = {"id": 100, "image_id": image_id, "category_id": 1, "iscrowd": 0, "bbox": [4, 4, 36, 24]}
    return found | {"segmentation": segmentation} | changed


def coco(
    images: Sequence[Any], annotations: Sequence[Any], categories: Sequence[Any] = CATEGORIES, **more: Any
) -> bytes:
    tables = {"images": images, "annotations": annotations, "categories": categories}
    return json.dumps({"info": {"year": 2026}, **tables, **more}).encode()


def coco_set(count: int, *, splits: Sequence[str] = ("train", "valid")) -> dict[str, bytes]:
    """Return `count` pictures a split with a triangle each, as Roboflow packs them."""
    files: dict[str, bytes] = {}
    for number, split in enumerate(splits):
        names = [f"{split}_{index:03d}.jpg" for index in range(count)]
        for index, name in enumerate(names):
            files[f"{split}/{name}"] = draw(1000 * number + index)
        files[f"{split}/_annotations.coco.json"] = coco(
            [image(index, name) for index, name in enumerate(names)],
            [annotation(index) for index in range(count)],
        )
    return files
