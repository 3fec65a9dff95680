"""What the demo trains on: a data set that it draws, or the user's, as an archive with its settings."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker.compute.archive import IMAGE_SUFFIXES
from rvmcv_worker.demo.drawing import draw_zip

#: Not a seed of any test, so that the demo's model has to do with pictures that nobody looked at.
DRAWN_SEED = 11
DRAWN_TRAIN, DRAWN_VAL, DRAWN_TEST = 600, 60, 80
DRAWN_SIZE_PX = 256
#: From scratch and in a few minutes on two cores: small pictures, small batches, many steps.
DRAWN_TRAINING: dict[str, Any] = {
    "base_model": "yolo11n.yaml",
    "epochs": 12,
    "img_size": 128,
    "batch_size": 8,
    "options": {
        "nbs": 8,
        "optimizer": "AdamW",
        "lr0": 0.003,
        "cos_lr": True,
        "warmup_epochs": 1,
        "warmup_bias_lr": 0,
        "mosaic": 0,
        "scale": 0.25,
    },
}
#: For a user's data. From scratch, since no weights come without a network.
OWN_TRAINING: dict[str, Any] = {"epochs": 30, "img_size": 320, "batch_size": 16}

#: Meta's names of SAM2.1's checkpoints, which say how large the model is.
SAM2_NAMES = tuple(f"sam2.1_hiera_{size}" for size in ("tiny", "small", "base_plus", "large"))

#: How many label files tell whether boxes or polygons were drawn.
_LABELS_LOOKED_AT = 20
_MAX_LABEL_BYTES = 10_000_000


class MaterialError(Exception):
    """The data set cannot be used; the message says what it is and what is expected."""


@dataclass(frozen=True)
class Material:
    """An archive and how to train on it."""

    archive: Path
    #: For people: where it is from.
    origin: str
    #: Fields of `POST /train`, without the data set.
    training: dict[str, Any]

    @property
    def label_task(self) -> str:
        """``detect`` or ``segment``."""
        return "segment" if "-seg" in self.training["base_model"] else "detect"


def drawn(directory: Path) -> Material:
    """Draw bottles and cans."""
    archive = draw_zip(
        directory / "drawn.zip",
        train=DRAWN_TRAIN,
        val=DRAWN_VAL,
        test=DRAWN_TEST,
        size_px=DRAWN_SIZE_PX,
        seed=DRAWN_SEED,
    )
    count = DRAWN_TRAIN + DRAWN_VAL + DRAWN_TEST
    return Material(archive, f"{count} drawn pictures of bottles and cans", DRAWN_TRAINING)


def segmenter_name(checkpoint: Path) -> str:
    """Return what RVM-Server shall call a SAM2 checkpoint of the user's. Raises `MaterialError`."""
    if checkpoint.is_file() and checkpoint.stem in SAM2_NAMES:
        return checkpoint.stem
    raise MaterialError(
        f"{checkpoint} is no SAM2.1 checkpoint: name a file that is called as Meta does, "
        f"{', '.join(f'{name}.pt' for name in SAM2_NAMES)}"
    )


def own(dataset: Path, directory: Path) -> Material:
    """Take the user's folder or zip. Raises `MaterialError`."""
    if dataset.is_dir():
        archive = _zip_folder(dataset, directory / "dataset.zip")
    elif zipfile.is_zipfile(dataset):
        archive = dataset.resolve()
    else:
        raise MaterialError(
            f"{dataset} is neither a folder nor a zip that can be read: "
            "name a data set in YOLO's layout, with images/ and labels/, as a folder or a zip"
        )
    model = "yolo11n-seg.yaml" if _has_polygons(archive) else "yolo11n.yaml"
    return Material(archive, str(dataset), {"base_model": model, **OWN_TRAINING})


def _zip_folder(folder: Path, archive: Path) -> Path:
    """Zip what lies in `folder` itself: no link is followed, no hidden file taken."""
    images = 0
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED, strict_timestamps=False) as out:
        for path in _files(folder):
            # As a FIFO would, a link that is swapped in between must not be opened.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as source:
                if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                    continue
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
                with out.open(entry, "w", force_zip64=True) as target:
                    while chunk := source.read(2**20):
                        target.write(chunk)
            images += path.suffix.lower() in IMAGE_SUFFIXES
    if not images:
        raise MaterialError(
            f"{folder} holds no images: name the folder above images/ and labels/ "
            f"(looked for {', '.join(sorted(IMAGE_SUFFIXES))}; links and hidden files are not followed)"
        )
    return archive


def _files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise MaterialError(f"{error.filename} cannot be read: {error.strerror}")

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name)
            if not name.startswith(".") and stat.S_ISREG(path.lstat().st_mode):
                yield path


def _has_polygons(archive: Path) -> bool:
    """Whether each line of the first label files is a class and at least three corners."""
    lines: list[list[str]] = []
    with zipfile.ZipFile(archive) as opened:
        labels = (entry for entry in opened.infolist() if "labels/" in entry.filename)
        for _, entry in zip(range(_LABELS_LOOKED_AT), _texts(labels), strict=False):
            try:
                text = opened.read(entry).decode(errors="replace")
            except (zipfile.BadZipFile, RuntimeError, NotImplementedError):
                return False  # The worker tells what is wrong with the archive.
            lines += [line.split() for line in text.splitlines() if line.strip()]
    return bool(lines) and all(len(line) >= 7 and len(line) % 2 == 1 for line in lines)


def _texts(entries: Iterator[zipfile.ZipInfo]) -> Iterator[zipfile.ZipInfo]:
    return (
        entry for entry in entries if entry.filename.endswith(".txt") and entry.file_size < _MAX_LABEL_BYTES
    )
