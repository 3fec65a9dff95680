"""Labels as YOLO has them: a text file beside each image, class names in a `data.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker.compute.archive import MAX_YAML_BYTES
from rvmcv_worker.compute.data_yaml import DataYaml, check_names, read_data_yaml
from rvmcv_worker.compute.labels import MAX_BYTES, Label, parse_label
from rvmcv_worker.compute.layouts import Item, Layout, plan
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.compute.report import Report
from rvmcv_worker.errors import DatasetInvalidError


@dataclass(frozen=True, slots=True)
class YoloSource:
    """A `label_source.Source`."""

    unpacked: Path
    names: tuple[str, ...]
    layout: Layout
    segment: bool
    #: Whether a polygon that crosses itself is told.
    tell_crossings: bool = False

    def label(self, item: Item, _size: tuple[int, int] | None) -> Label:
        """Judge the image's label file; without one it is background."""
        text = b""
        if item.label:
            with (self.unpacked / item.label).open("rb") as file:
                text = file.read(MAX_BYTES + 1)
        return parse_label(text, len(self.names), segment=self.segment, tell_crossings=self.tell_crossings)

    def blamed(self, item: Item) -> str:
        """Return the file that an image's faults are told of."""
        return item.label or item.image


def find_yolo(job: dict[str, Any], unpacked: Path, files: Sequence[str], report: Report) -> YoloSource:
    """Return the labels of a data set in YOLO's format; raises `DatasetInvalidError` when there are none."""
    hints = read_data_yaml(unpacked, files)
    report.warnings += hints.warnings
    report.names = _class_names(job, hints, unpacked, files, report)
    layout = plan(files, hints)
    report.layout = layout.description
    report.warnings += layout.warnings
    takes_coco = job["job_type"] == "sam2"
    _require_labels(layout, report, takes_coco=takes_coco)
    return YoloSource(unpacked, report.names, layout, job["label_task"] == "segment", takes_coco)


def _class_names(
    job: dict[str, Any], hints: DataYaml, unpacked: Path, files: Sequence[str], report: Report
) -> tuple[str, ...]:
    """Return the class names: of `data.yaml`, else of the job, else of a `classes.txt`."""
    given = check_names(job["names"], "the job's names") if job.get("names") else None
    if hints.names:
        if given and given != hints.names:
            report.warnings.append(
                f"the job's class names differ from those in {printable(hints.file)}, which count"
            )
        return hints.names
    if given:
        return given
    lists = sorted((name for name in files if name.lower().rpartition("/")[2] == "classes.txt"), key=len)
    if lists:
        with (unpacked / lists[0]).open(encoding="utf-8-sig", errors="replace") as file:
            text = file.read(MAX_YAML_BYTES)
        report.warnings.append(f"class names come from {printable(lists[0])}")
        return check_names(text.rstrip().splitlines(), printable(lists[0]))
    raise DatasetInvalidError(
        "the data set has no class names: put a data.yaml with 'names: [first, second]' beside the images, "
        "or give 'names' in the job"
    )


def _require_labels(layout: Layout, report: Report, *, takes_coco: bool) -> None:
    if any(item.label for items in layout.splits.values() for item in items):
        return
    needed = "labels/… beside images/… with a .txt of YOLO's format an image is needed"
    if takes_coco:
        needed += ", or a COCO JSON with images, annotations and categories"
    other = {".xml": "Pascal VOC", ".json": "COCO or LabelMe"}
    kinds = " and ".join(
        f"{report.skipped[end]} {end} ({what})" for end, what in other.items() if end in report.skipped
    )
    if kinds:
        needed += f"; found {kinds}, which must be converted to YOLO's format first"
        if ".json" in report.skipped:
            needed += ". A sam2 job takes COCO's as it is"
    raise DatasetInvalidError(f"no image has a label file: {needed}")
