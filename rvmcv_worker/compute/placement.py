"""Good images and their labels, brought into the layout that our `data.yaml` tells of."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.layouts import Item
from rvmcv_worker.compute.preflight import Sample


def place(
    good: dict[str, tuple[Item, ...]], samples: dict[str, Sample], unpacked: Path, data: Path, child: Child
) -> None:
    """Fill ``images/<split>`` and ``labels/<split>`` of `data`, then drop what is left of `unpacked`."""
    for split, items in good.items():
        for index, item in enumerate(items):
            if index % 256 == 0:
                child.check_stop()
            _link(unpacked / item.image, data / "images" / split / item.target)
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
        (data / "labels" / split).mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unpacked)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
