"""Data sets drawn and packed for the tests of the prepare child."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rvmcv_worker.compute import datasets, instances
from rvmcv_worker.compute.archive import Limits
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.instances import LabelledImage

LIMITS = {
    "max_unpacked_bytes": 200_000_000,
    "max_entries": 5000,
    "max_ratio": 200.0,
    "max_image_pixels": 25_000_000,
}
BOX = b"0 0.5 0.5 0.25 0.25\n"


def limits(**changed: Any) -> Limits:
    return Limits.from_job({**LIMITS, **changed})


def draw(seed: int, size: tuple[int, int] = (48, 32), form: str = "JPEG") -> bytes:
    """Return an encoded picture, a different one for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(out, form)
    return out.getvalue()


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def pack_folder(path: Path, folder: Path, top: str = "") -> Path:
    return pack(
        path,
        {
            top + file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
    )


def yolo(
    count: int, *, top: str = "", splits: tuple[str, ...] = ("train", "val"), seed: int = 0
) -> dict[str, bytes]:
    """Return `count` labelled pictures a split, in the layout ``images/<split>`` + ``labels/<split>``."""
    files: dict[str, bytes] = {}
    for number, split in enumerate(splits):
        for index in range(count):
            name = f"{split}_{index:03d}"
            files[f"{top}images/{split}/{name}.jpg"] = draw(seed + 1000 * number + index)
            files[f"{top}labels/{split}/{name}.txt"] = BOX
    return files


class Prepared:
    """A prepare child's workspace, in which `run` does what the child would."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "in").mkdir(parents=True)
        (root / "prepare").mkdir()
        self.archive = root / "in" / "dataset.zip"
        self.data = root / "prepare" / "data"

    def run(self, **changed: Any) -> dict[str, Any]:
        job = {
            "task": "prepare",
            "archive": "in/dataset.zip",
            "job_type": "yolo11",
            "label_task": "detect",
            "names": None,
            "seed": 0,
            "val_fraction": 0.2,
            "max_bad_fraction": 0.1,
            "limits": LIMITS,
        }
        sink = os.open(os.devnull, os.O_WRONLY)
        try:
            child = Child(root=self.root, directory=self.root / "prepare", progress_fd=sink)
            return datasets.run({**job, **changed}, child)
        finally:
            os.close(sink)

    def run_sam2(self, **changed: Any) -> dict[str, Any]:
        return self.run(**{"job_type": "sam2", "label_task": "segment", **changed})

    def labelled(self, split: str) -> dict[str, LabelledImage]:
        """Return what a run for SAM2 has written of a split, by the file's name."""
        found = instances.read(self.data / "instances" / f"{split}.jsonl")
        return {image.path.rpartition("/")[2]: image for image in found}

    def images(self, split: str) -> list[str]:
        """Return the placed images, in the order in which Ultralytics reads them."""
        folder = self.data / "images" / split
        return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.*"))
