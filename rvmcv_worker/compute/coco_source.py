"""Labels as COCO has them: JSON files, each of many images, with the categories in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from rvmcv_worker.compute import coco_labels
from rvmcv_worker.compute.coco_categories import classes_of
from rvmcv_worker.compute.coco_json import CocoFile, read_coco
from rvmcv_worker.compute.coco_listing import Labelled, Listing, split_of_file
from rvmcv_worker.compute.data_yaml import DataYaml, check_names
from rvmcv_worker.compute.faults import Effect
from rvmcv_worker.compute.labels import Label
from rvmcv_worker.compute.layouts import Item, Layout, plan
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.compute.report import Report
from rvmcv_worker.errors import DatasetInvalidError

#: JSON files that are looked into; more are LabelMe's, one an image.
_MAX_FILES = 200
#: What a file of COCO's format is usually called.
_USUAL_NAME = re.compile(r"coco|instances|annotations", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CocoSource:
    """A `label_source.Source`."""

    names: tuple[str, ...]
    layout: Layout
    class_ids: Mapping[int, int]
    labelled: Mapping[str, Labelled]

    def label(self, item: Item, size: tuple[int, int] | None) -> Label:
        """Judge what the files say of an image."""
        known = self.labelled[item.image]
        if any(fault.kind.effect is Effect.IMAGE for fault in known.faults):
            return Label(classes=(), faults=known.faults)
        label = coco_labels.judge(known.image, known.annotations, self.class_ids, size)
        return replace(label, faults=known.faults + label.faults)

    def blamed(self, item: Item) -> str:
        """Return the image: the file with its labels has those of many."""
        return item.image


def find_coco(
    job: dict[str, Any],
    unpacked: Path,
    files: Sequence[str],
    report: Report,
    max_pixels: int,
    tick: Callable[[], None],
) -> CocoSource | None:
    """Return the labels of a data set in COCO's format, None when it has none that count.

    Where there are label files of YOLO's too, COCO's count if they have more than boxes.
    """
    cocos, broken = _read_all(unpacked, files, report, max_pixels, tick)
    items = (item for found in plan(files, DataYaml()).splits.values() for item in found)
    texts = sum(item.label is not None for item in items)
    if broken and not cocos and not texts:
        raise broken[0]
    report.warnings += [f"not read: {error.message}" for error in broken[:3]]
    if not cocos:
        return None
    shown = ", ".join(printable(coco.name) for coco in cocos[:3])
    if texts:
        if not any(coco.has_segmentations for coco in cocos):
            report.warnings.append(f"{shown} has boxes alone: the label files beside the images count")
            return None
        report.warnings.append(
            f"labels are taken from {shown}: the {texts} label file(s) of YOLO's format beside the images "
            "are not read; take out what is not meant"
        )
    classes = classes_of(cocos, report.warnings)
    report.names = check_names(list(classes.values()), f"the categories of {shown}")
    if job.get("names") and check_names(job["names"], "the job's names") != report.names:
        report.warnings.append(f"the job's class names differ from the categories of {shown}, which count")
    listing = Listing(files, report)
    for coco in cocos:
        tick()
        listing.add(coco)
    layout = listing.layout()
    report.layout = layout.description
    report.warnings += layout.warnings
    class_ids = {category_id: index for index, category_id in enumerate(classes)}
    return CocoSource(report.names, layout, class_ids, listing.labelled)


def _read_all(
    unpacked: Path, files: Sequence[str], report: Report, max_pixels: int, tick: Callable[[], None]
) -> tuple[list[CocoFile], list[DatasetInvalidError]]:
    """Return the files that tell of instances, and what is wrong with others that are no JSON.

    A file whose name says that it is meant must be one.
    """
    names = sorted(
        (name for name in files if name.lower().endswith(".json")),
        key=lambda name: (_USUAL_NAME.search(name) is None, name),
    )
    if len(names) > _MAX_FILES:
        report.warnings.append(f"{len(names) - _MAX_FILES} of {len(names)} .json files are not looked into")
    cocos: list[CocoFile] = []
    others: list[str] = []
    broken: list[DatasetInvalidError] = []
    for name in names[:_MAX_FILES]:
        try:
            coco = read_coco(unpacked / name, name, max_pixels, tick)
        except DatasetInvalidError as error:
            if _USUAL_NAME.search(name) or split_of_file(name):
                raise
            broken.append(error)
            continue
        if coco:
            cocos.append(coco)
        else:
            others.append(printable(name))
    if others:
        what = "are not of COCO's format (images, annotations and categories)"
        report.warnings.append(f"{len(others)} .json file(s) {what}, as {others[0]}")
    # COCO has files of captions, key points and stuff beside that of the instances.
    named = [coco for coco in cocos if PurePosixPath(coco.name).name.lower().startswith("instances")]
    in_splits = [coco for coco in named or cocos if split_of_file(coco.name)]
    chosen = in_splits or named or cocos
    kept = {coco.name for coco in chosen}
    if left := [printable(coco.name) for coco in cocos if coco.name not in kept]:
        report.warnings.append(f"{len(left)} other file(s) of COCO's format are not used, as {left[0]}")
    return chosen, broken
