"""What the demo trains on: a data set that it draws, or the user's, as an archive with its settings."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rvmcv_worker.compute.archive import IMAGE_SUFFIXES
from rvmcv_worker.demo.drawing import draw_zip
from rvmcv_worker.demo.wishes import Wishes
from rvmcv_worker.sam2_options import ARCHITECTURES, SCRATCH

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
#: With a fine-tuning of SAM2 after it: boxes good enough to ask for masks, in half of the time.
DRAWN_SEGMENT_TRAIN, DRAWN_SEGMENT_EPOCHS = 500, 6
#: From random weights all is to be learnt: small pictures, many steps, and boxes alone, as in inference.
FROM_SCRATCH: dict[str, Any] = {
    "base_model": SCRATCH,
    "epochs": 10,
    "img_size": 128,
    "batch_size": 4,
    "options": {"box_share": 1, "clicks": 0, "fliplr": 0, "lr0": 5e-4, "warmup_epochs": 0.3, "patience": 0},
}
#: From a checkpoint: the worker's own defaults, but for what would take hours without a GPU.
FROM_CHECKPOINT: dict[str, Any] = {"epochs": 3, "img_size": 256, "batch_size": 4, "options": {"clicks": 1}}
#: For a user's data. From scratch, since no weights come without a network.
OWN_TRAINING: dict[str, Any] = {"epochs": 30, "img_size": 320, "batch_size": 16}

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
    #: The same for a fine-tuning of SAM2; None where there is none.
    segmenting: dict[str, Any] | None = None

    @property
    def label_task(self) -> str:
        """``detect`` or ``segment``."""
        return "segment" if "-seg" in self.training["base_model"] else "detect"


def prepare(wishes: Wishes, directory: Path) -> Material:
    """Take the user's data, or draw some, with all that is wished for. Raises `MaterialError`."""
    sam2 = FROM_SCRATCH
    if wishes.sam2 is not None:
        sam2 = {**FROM_CHECKPOINT, "base_model": segmenter_name(wishes.sam2)}
    if wishes.dataset is None:
        data = drawn(directory, segment=wishes.segment)
    else:
        data = own(wishes.dataset, directory, segment=wishes.segment)
    given = {"epochs": wishes.epochs, "img_size": wishes.img_size}
    wished = {key: value for key, value in given.items() if value is not None}
    data = replace(data, training=data.training | wished)
    if not wishes.segment:
        return data
    fields = {"job_type": "sam2", **sam2, **wished}
    # SAM2's own steps and bounds.
    fields["img_size"] = min(1024, max(64, -(-fields["img_size"] // 32) * 32))
    return replace(data, segmenting=fields)


def drawn(directory: Path, *, segment: bool) -> Material:
    """Draw bottles and cans, with polygons for a fine-tuning of SAM2."""
    train = DRAWN_SEGMENT_TRAIN if segment else DRAWN_TRAIN
    archive = draw_zip(
        directory / "drawn.zip",
        train=train,
        val=DRAWN_VAL,
        test=DRAWN_TEST,
        size_px=DRAWN_SIZE_PX,
        seed=DRAWN_SEED,
        segment=segment,
    )
    origin = f"{train + DRAWN_VAL + DRAWN_TEST} drawn pictures of bottles and cans"
    shorter = {"epochs": DRAWN_SEGMENT_EPOCHS} if segment else {}
    return Material(archive, origin, DRAWN_TRAINING | shorter)


def segmenter_name(checkpoint: Path) -> str:
    """Return what RVM-Server shall call a SAM2 checkpoint of the user's. Raises `MaterialError`."""
    if checkpoint.is_file() and checkpoint.stem in ARCHITECTURES:
        return checkpoint.stem
    raise MaterialError(
        f"{checkpoint} is no SAM2.1 checkpoint: name a file that is called as Meta does, "
        f"{', '.join(f'{name}.pt' for name in ARCHITECTURES)}"
    )


def own(dataset: Path, directory: Path, *, segment: bool = False) -> Material:
    """Take the user's folder or zip, for a fine-tuning of SAM2 only with polygons. Raises `MaterialError`."""
    if dataset.is_dir():
        archive = _zip_folder(dataset, directory / "dataset.zip")
    elif zipfile.is_zipfile(dataset):
        archive = dataset.resolve()
    else:
        raise MaterialError(
            f"{dataset} is neither a folder nor a zip that can be read: "
            "name a data set in YOLO's layout, with images/ and labels/, as a folder or a zip"
        )
    lines = _first_lines(archive)
    has_polygons = bool(lines) and all(len(line) >= 7 and len(line) % 2 == 1 for line in lines)
    if segment and lines and not has_polygons:
        raise MaterialError(
            f"{dataset} has boxes where SAM2 needs outlines to learn from: "
            "name a data set whose labels are polygons, or leave SEGMENT out"
        )
    model = "yolo11n-seg.yaml" if has_polygons else "yolo11n.yaml"
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


def _first_lines(archive: Path) -> list[list[str]]:
    """Return the lines of the first label files, in words; none where there are none to be read."""
    lines: list[list[str]] = []
    with zipfile.ZipFile(archive) as opened:
        labels = (entry for entry in opened.infolist() if "labels/" in entry.filename)
        for _, entry in zip(range(_LABELS_LOOKED_AT), _texts(labels), strict=False):
            try:
                text = opened.read(entry).decode(errors="replace")
            except (zipfile.BadZipFile, RuntimeError, NotImplementedError):
                return []  # The worker tells what is wrong with the archive.
            lines += [line.split() for line in text.splitlines() if line.strip()]
    return lines


def _texts(entries: Iterator[zipfile.ZipInfo]) -> Iterator[zipfile.ZipInfo]:
    return (
        entry for entry in entries if entry.filename.endswith(".txt") and entry.file_size < _MAX_LABEL_BYTES
    )
