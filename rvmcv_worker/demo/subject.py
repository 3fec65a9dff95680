"""What inferences are asked about: pictures of the data set, brought to storage as RVM-Edge does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker.demo import gallery
from rvmcv_worker.demo.admin import Admin
from rvmcv_worker.demo.gallery import UNSEEN_FIRST, VAL_FIRST, Gallery
from rvmcv_worker.demo.material import Material

SINGLE_PICTURES = 12
#: Of a large data set a batch takes so many pictures, spread over its val split.
BATCH_PICTURES = 200


@dataclass(frozen=True)
class Placed:
    """Pictures of one split, and where each lies in storage."""

    gallery: Gallery
    urls: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The pictures' file names."""
        return [picture.file.name for picture in self.gallery.pictures]


@dataclass(frozen=True)
class Subject:
    """All that is asked about."""

    single: Placed
    batch: Placed
    #: The classes that the model has learnt.
    classes: tuple[str, ...]
    #: As the training measured it.
    map50: float
    #: Multiple of 32, as inferences want it.
    img_size: int
    label_task: str

    @classmethod
    def prepare(cls, admin: Admin, data: Material, result: dict[str, Any], directory: Path) -> Subject:
        """Choose pictures after a training with this result, and bring them to storage."""
        classes = result["data"]["names"]
        single = gallery.choose(data.archive, directory / "single", classes, SINGLE_PICTURES, UNSEEN_FIRST)
        batch = gallery.choose(data.archive, directory / "batch", classes, BATCH_PICTURES, VAL_FIRST)
        return cls(
            single=_place(admin, single, "single"),
            batch=_place(admin, batch, "batch"),
            classes=tuple(classes),
            map50=(result["metrics"].get("test") or result["metrics"])["mAP50"],
            img_size=min(2048, -(-data.training["img_size"] // 32) * 32),
            label_task=data.label_task,
        )


def _place(admin: Admin, chosen: Gallery, folder: str) -> Placed:
    urls = [
        admin.put_image(picture.file, f"{folder}/{i:04d}{picture.file.suffix.lower()}")
        for i, picture in enumerate(chosen.pictures)
    ]
    return Placed(chosen, tuple(urls))
