"""The prepare child: an archive in, a data set that can be trained on out, and a report in any case.

prepare/data/images/<split>/…   prepare/report.json, and
for YOLO11   prepare/data/labels/<split>/…   prepare/data.yaml
for SAM2     prepare/data/instances/<split>.jsonl
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rvmcv_worker.compute.archive import Limits, extract
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.coco_source import find_coco
from rvmcv_worker.compute.data_yaml import SPLITS, write_data_yaml
from rvmcv_worker.compute.label_source import Source
from rvmcv_worker.compute.layouts import Item
from rvmcv_worker.compute.leaks import find_leaks, near_groups
from rvmcv_worker.compute.placement import place_images, place_instances, place_labels
from rvmcv_worker.compute.preflight import Check, Sample, inspect_all
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.compute.report import Report
from rvmcv_worker.compute.val_split import choose_val
from rvmcv_worker.compute.yolo_source import find_yolo
from rvmcv_worker.errors import DatasetInvalidError

_REPORT_INTERVAL_S = 0.5
#: Where unpacking and looking end, as fractions of the whole.
_UNPACKED, _INSPECTED = 0.3, 0.9


def run(job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Unpack, look, clean, and write; returns the report.

    Raises `DatasetInvalidError`, with the report so far as its detail, when the archive is hostile or what is
    left of it would train rubbish.
    """
    report = Report()
    try:
        _prepare(job, child, report)
    except DatasetInvalidError as error:
        detail = report.write(child.directory / "report.json")
        raise DatasetInvalidError(error.message, detail=detail) from error
    return report.write(child.directory / "report.json")


def _prepare(job: dict[str, Any], child: Child, report: Report) -> None:
    progress = _Progress(child)
    limits = Limits.from_job(job["limits"])
    unpacked = child.directory / "unpacked"
    sam2 = job["job_type"] == "sam2"
    found = extract(
        child.root / job["archive"],
        unpacked,
        limits,
        lambda done: progress.at(done * _UNPACKED),
        with_json=sam2,
    )
    report.skipped = found.skipped

    source: Source | None = None
    if sam2:
        source = find_coco(job, unpacked, found.files, report, limits.max_image_pixels, child.check_stop)
    if source is None:
        source = find_yolo(job, unpacked, found.files, report)
    layout = source.layout

    check = Check(unpacked, source, limits.max_image_pixels, decode=sam2)
    items = [item for found_items in layout.splits.values() for item in found_items]
    samples = inspect_all(items, check, report.faults, progress.inspected)
    _require_good(items, samples, layout.missing, report, float(job["max_bad_fraction"]))

    good = {
        split: tuple(item for item in found_items if not samples[item.image].bad)
        for split, found_items in layout.splits.items()
    }
    if "val" not in good:
        good = _split_off_val(good, samples, job, child, report)
    good = {split: good[split] for split in SPLITS if split in good}
    for split, split_items in good.items():
        report.add_split(split, split_items, samples)
    _require_instances(good, samples, report)
    for one, other in combinations(good, 2):
        progress.at(_INSPECTED)
        images = [
            [(samples[item.image].sha256, samples[item.image].dhash) for item in good[s]]
            for s in (one, other)
        ]
        report.add_leaks(one, other, find_leaks(images[0], images[1], child.check_stop), good)

    data = child.directory / "data"
    place_images(good, unpacked, data, child)
    if sam2:
        place_instances(good, samples, source, data, child)
    else:
        place_labels(good, samples, unpacked, data, child)
        write_data_yaml(child.directory / "data.yaml", data, list(good), report.names)
    shutil.rmtree(unpacked)
    progress.at(1.0, force=True)


class _Progress:
    """Reports a few times a second, and stops when the daemon wishes."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._last_s = -_REPORT_INTERVAL_S

    def at(self, fraction: float, *, force: bool = False, **progress: int) -> None:
        self._child.check_stop()
        now_s = time.monotonic()
        if force or now_s - self._last_s >= _REPORT_INTERVAL_S:
            self._last_s = now_s
            self._child.report(phase="verify", fraction=round(fraction, 4), **progress)

    def inspected(self, done: int, total: int) -> None:
        share = done / total if total else 1.0
        self.at(
            _UNPACKED + share * (_INSPECTED - _UNPACKED),
            force=done == total,
            images_done=done,
            images_total=total,
        )


def _require_good(
    items: Sequence[Item], samples: dict[str, Sample], missing: int, report: Report, max_bad_fraction: float
) -> None:
    """Refuse a set with too many bad images, and one in which nothing is labelled."""
    report.images = len(samples) + missing
    report.bad_images = sum(sample.bad for sample in samples.values()) + missing
    if report.bad_fraction > max_bad_fraction:
        raise DatasetInvalidError(
            f"{report.bad_images} of {report.images} images ({report.bad_fraction:.1%}) are bad, at most "
            f"{max_bad_fraction:.1%} may be. First: {report.faults.first(3)}. "
            "Correct what the report lists, or take these images out"
        )
    if report.bad_images:
        report.warnings.append(
            f"{report.bad_images} of {report.images} images ({report.bad_fraction:.1%}) are bad and left out"
        )
    if not any(sample.classes for sample in samples.values() if not sample.bad):
        raise DatasetInvalidError(
            f"none of the {len(samples)} images has a labelled object: all labels are empty or missing, as "
            f"{printable(items[0].label or items[0].image)}. Label the objects first"
        )


def _split_off_val(
    good: dict[str, tuple[Item, ...]],
    samples: dict[str, Sample],
    job: dict[str, Any],
    child: Child,
    report: Report,
) -> dict[str, tuple[Item, ...]]:
    """Return the splits with a val split taken from train by the job's seed."""
    train = good.get("train", ())
    own = [samples[item.image] for item in train]
    groups = near_groups([(sample.sha256, sample.dhash) for sample in own], child.check_stop)
    chosen = choose_val(
        [sample.classes for sample in own], groups, float(job["val_fraction"]), int(job["seed"])
    )
    if not chosen:
        raise DatasetInvalidError(
            f"the data set has no val split, and {len(train)} usable train image(s) are too few to make one"
        )
    report.warnings.append(
        f"the data set has no val split: {len(chosen)} of {len(train)} train images are val, "
        f"chosen by seed {job['seed']}"
    )
    return {
        **good,
        "train": tuple(item for index, item in enumerate(train) if index not in chosen),
        "val": tuple(item for index, item in enumerate(train) if index in chosen),
    }


def _require_instances(good: dict[str, tuple[Item, ...]], samples: dict[str, Sample], report: Report) -> None:
    """Refuse what Ultralytics would train on without an error, to no use."""
    classes = {
        split: {class_id for item in items for class_id in samples[item.image].classes}
        for split, items in good.items()
    }
    for split in ("train", "val"):
        if not good.get(split):
            raise DatasetInvalidError(
                f"the {split} split has no usable image. First faults: "
                f"{report.faults.first(3) or '; '.join(report.warnings[:3]) or 'none'}"
            )
        if not classes[split]:
            where = printable(good[split][0].label or good[split][0].image)
            raise DatasetInvalidError(
                f"no image of the {split} split has a labelled object: {len(good[split])} images, all labels "
                f"empty or missing, as {where}. Label the objects, or take the split out"
            )
    background = sum(not samples[item.image].classes for item in good["train"])
    if background * 2 > len(good["train"]):
        report.warnings.append(
            f"{background} of {len(good['train'])} train images have no labelled object: is that meant so?"
        )
    untrained = sorted(set(range(len(report.names))) - classes["train"])
    if untrained:
        listed = ", ".join(report.names[class_id] for class_id in untrained[:10])
        report.warnings.append(
            f"{len(untrained)} of {len(report.names)} classes have no object in train: {listed}"
        )
