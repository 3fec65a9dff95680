"""Good images and their labels, brought into the layout that a training reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rvmcv_worker.compute import instances
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.instances import LabelledImage
from rvmcv_worker.compute.label_source import Source
from rvmcv_worker.compute.layouts import Item
from rvmcv_worker.compute.preflight import Sample


def place_images(good: dict[str, tuple[Item, ...]], unpacked: Path, data: Path, child: Child) -> None:
    """Fill ``images/<split>`` of `data`."""
    for split, items in good.items():
        for index, item in enumerate(items):
            if index % 256 == 0:
                child.check_stop()
            _link(unpacked / item.image, data / "images" / split / item.target)


def place_labels(
    good: dict[str, tuple[Item, ...]], samples: dict[str, Sample], unpacked: Path, data: Path, child: Child
) -> None:
    """Fill ``labels/<split>`` of `data`, from label files."""
    for split, items in good.items():
        (data / "labels" / split).mkdir(parents=True, exist_ok=True)
        for index, item in enumerate(items):
            if index % 256 == 0:
                child.check_stop()
            if item.label is None:
                continue
            label = data / "labels" / split / item.label_target
            rewritten = samples[item.image].rewritten
            if label.exists():
                continue  # a.jpg and a.png share a.txt
            if rewritten is None:
                _link(unpacked / item.label, label)
            else:
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_text(rewritten, encoding="utf-8")


def place_instances(
    good: dict[str, tuple[Item, ...]], samples: dict[str, Sample], source: Source, data: Path, child: Child
) -> None:
    """Fill ``instances`` of `data`.

    Labels are judged a second time rather than kept: those of all images together may be large.
    """
    for split, items in good.items():

        def labelled(split: str = split, items: tuple[Item, ...] = items) -> Iterator[LabelledImage]:
            for index, item in enumerate(items):
                if index % 256 == 0:
                    child.check_stop()
                size = samples[item.image].size
                assert size is not None
                found = source.label(item, size).instances
                yield LabelledImage(f"images/{split}/{item.target}", *size, found)

        instances.write(data / "instances" / f"{split}.jsonl", labelled())


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
