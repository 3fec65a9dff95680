"""A few pictures of a data set that the model was not trained on, with what their labels say."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps

from rvmcv_worker.compute.data_yaml import DataYaml, read_data_yaml
from rvmcv_worker.compute.layouts import Item, plan
from rvmcv_worker.demo.sheet import Box, Truth

#: What a gallery is chosen from, most wanted first: the model has seen the pictures of `train`.
UNSEEN_FIRST = ("test", "val", "train")
VAL_FIRST = ("val", "test", "train")


@dataclass(frozen=True)
class Picture:
    """One picture, unpacked, and its truths."""

    file: Path
    truths: tuple[Truth, ...]


@dataclass(frozen=True)
class Gallery:
    """Pictures of one split."""

    split: str
    pictures: tuple[Picture, ...]
    #: How many pictures the split has.
    total: int

    def describe(self, shown: int) -> str:
        """Say where so many pictures of it are from, for people."""
        count = str(shown) if shown == self.total else f"{shown} of the {self.total}"
        return f"{count} pictures of {self.split}" + (" (trained on)" if self.split == "train" else "")

    @property
    def described(self) -> str:
        """Where all of them are from."""
        return self.describe(len(self.pictures))


def choose(
    archive: Path,
    directory: Path,
    names: Sequence[str],
    count: int,
    splits_wanted: Sequence[str] = UNSEEN_FIRST,
) -> Gallery:
    """Unpack `count` pictures, spread over the first split wanted that there is, into `directory`.

    `names` are the classes.
    """
    directory.mkdir()
    with zipfile.ZipFile(archive) as opened:
        files = [entry.filename for entry in opened.infolist() if not entry.is_dir()]
        splits = plan(files, _hints(opened, files)).splits
        split = next(name for name in splits_wanted if splits.get(name))
        items = splits[split]
        step = max(1.0, len(items) / count)
        chosen = [items[int(place * step)] for place in range(min(count, len(items)))]
        pictures = [_unpack(opened, item, directory / f"{i:02d}", names) for i, item in enumerate(chosen)]
    return Gallery(split, tuple(pictures), len(items))


def _hints(opened: zipfile.ZipFile, files: Sequence[str]) -> DataYaml:
    """Read the data set's YAML, which names its splits."""
    yamls = [name for name in files if PurePosixPath(name).suffix.lower() in {".yaml", ".yml"}]
    with tempfile.TemporaryDirectory(prefix="rvmcv-demo-") as folder:
        # The archive has passed the worker's check: none of its names leads out of the folder.
        opened.extractall(folder, yamls)
        return read_data_yaml(Path(folder), yamls)


def _unpack(opened: zipfile.ZipFile, item: Item, folder: Path, names: Sequence[str]) -> Picture:
    folder.mkdir()
    file = folder / PurePosixPath(item.image).name
    file.write_bytes(opened.read(item.image))
    text = opened.read(item.label).decode(errors="replace") if item.label else ""
    with Image.open(file) as picture:
        # Labels are relative to the picture as it is shown.
        size_px = ImageOps.exif_transpose(picture).size
    return Picture(file, tuple(truths_of(text, size_px, names)))


def truths_of(label: str, size_px: tuple[int, int], names: Sequence[str]) -> list[Truth]:
    """Return what a YOLO label says of a picture of (width, height); lines that say nothing are left out."""
    truths = []
    for line in label.splitlines():
        try:
            class_id, *numbers = (float(word) for word in line.split())
            truths.append(Truth(names[int(class_id)], _box(numbers, *size_px)))
        except (ValueError, IndexError):
            continue  # The data report names it.
    return truths


def _box(numbers: Sequence[float], width: int, height: int) -> Box:
    """Return the box that is meant by `x y w h`, or by a polygon's corners, all from 0 to 1."""
    if len(numbers) == 4:
        x, y, w, h = numbers
        return (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
    xs, ys = numbers[0::2], numbers[1::2]
    return min(xs) * width, min(ys) * height, max(xs) * width, max(ys) * height
