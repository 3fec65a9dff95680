"""One JSON file of COCO's format, made small while it is read: its images, annotations and categories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rvmcv_worker.compute.coco_segmentation import Segmentation, read_segmentation
from rvmcv_worker.compute.json_stream import JsonStream
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.errors import DatasetInvalidError

_KEYS = frozenset({"images", "annotations", "categories"})
#: More than any file of `archive.MAX_JSON_BYTES` has that tells of real objects.
_MAX_IMAGES = 1_000_000
_MAX_ANNOTATIONS = 3_000_000
_MAX_CATEGORIES = 10_000
_MAX_FILE_NAME_CHARS = 1024
_MAX_ID_CHARS = 100


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An entry of ``images``."""

    id: str
    file_name: str
    #: Pixels; None where the file does not say, and 0 for what is no number of pixels.
    height: int | None
    width: int | None


@dataclass(frozen=True, slots=True)
class Annotation:
    """An entry of ``annotations``: one object."""

    id: str
    #: The id of its category, None for what is none.
    category: int | None
    segmentation: Segmentation
    #: Whether it is many objects in one, which are not to be told apart.
    crowd: bool


@dataclass(frozen=True, slots=True)
class Category:
    """An entry of ``categories``."""

    name: str
    supercategory: str


@dataclass(frozen=True)
class CocoFile:
    """What a file holds."""

    #: Path in the archive.
    name: str
    images: list[CocoImage] = field(default_factory=list)
    #: By the image's id.
    annotations: dict[str, list[Annotation]] = field(default_factory=lambda: defaultdict(list))
    categories: dict[int, Category] = field(default_factory=dict)

    @property
    def has_segmentations(self) -> bool:
        """Whether an object has more than a box."""
        return any(found.segmentation is not None for many in self.annotations.values() for found in many)


def read_coco(path: Path, name: str, max_pixels: int, tick: Callable[[], None]) -> CocoFile | None:
    """Return what the file at `path` holds, called `name` in messages; None when it is not of COCO's format.

    Raises `DatasetInvalidError` for what is no JSON, and for an entry without what makes it one.
    """
    coco = CocoFile(name)
    found: set[str] = set()
    with closing(JsonStream(path, name, tick)) as stream:
        for key in stream.names():
            if key not in _KEYS:
                stream.value()
                continue
            found.add(key)
            for index, entry in enumerate(stream.entries()):
                where = f"{printable(name)}: {key}[{index}]"
                if not isinstance(entry, dict):
                    raise DatasetInvalidError(f"{where} is not an object with names and values")
                if key == "images":
                    _add_image(coco, entry, where)
                elif key == "annotations":
                    _add_annotation(coco, entry, where, index, max_pixels)
                else:
                    _add_category(coco, entry, where)
    return coco if found == _KEYS else None


def _add_image(coco: CocoFile, entry: dict[str, Any], where: str) -> None:
    file_name, image_id = entry.get("file_name"), _id(entry.get("id"))
    if image_id is None or not isinstance(file_name, str) or not 0 < len(file_name) <= _MAX_FILE_NAME_CHARS:
        raise DatasetInvalidError(f"{where} needs an id and a file_name")
    if len(coco.images) >= _MAX_IMAGES:
        raise DatasetInvalidError(f"{where}: more than {_MAX_IMAGES} images, which is the limit")
    coco.images.append(
        CocoImage(image_id, file_name, _pixels(entry.get("height")), _pixels(entry.get("width")))
    )


def _add_annotation(coco: CocoFile, entry: dict[str, Any], where: str, index: int, max_pixels: int) -> None:
    image_id = _id(entry.get("image_id"))
    if image_id is None:
        raise DatasetInvalidError(f"{where} has no image_id")
    if index >= _MAX_ANNOTATIONS:
        raise DatasetInvalidError(f"{where}: more than {_MAX_ANNOTATIONS} annotations, which is the limit")
    category = entry.get("category_id")
    coco.annotations[image_id].append(
        Annotation(
            id=_id(entry.get("id")) or f"[{index}]",
            category=category if type(category) is int else None,
            segmentation=read_segmentation(entry.get("segmentation"), max_pixels),
            crowd=bool(entry.get("iscrowd")),
        )
    )


def _add_category(coco: CocoFile, entry: dict[str, Any], where: str) -> None:
    category_id, name, above = entry.get("id"), entry.get("name"), entry.get("supercategory")
    if type(category_id) is not int or not isinstance(name, str):
        raise DatasetInvalidError(f"{where} needs a whole number as id and a name")
    known = coco.categories.get(category_id)
    if known and known.name != name:
        raise DatasetInvalidError(
            f"{where}: id {printable(str(category_id), 30)} is '{printable(name, 100)}' here and "
            f"'{printable(known.name, 100)}' before"
        )
    if len(coco.categories) >= _MAX_CATEGORIES:
        raise DatasetInvalidError(f"{where}: more than {_MAX_CATEGORIES} categories, which is the limit")
    coco.categories[category_id] = Category(name, above if isinstance(above, str) else "")


def _id(value: object) -> str | None:
    """Return an id as text: some tools write numbers as such."""
    if type(value) is int or isinstance(value, str):
        text = str(value)
        return text if 0 < len(text) <= _MAX_ID_CHARS else None
    return None


def _pixels(value: object) -> int | None:
    if value is None:
        return None
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return int(value) if 0 < value < 2**31 else 0
    return 0
