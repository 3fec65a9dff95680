"""The images that COCO files list, brought together with those of the archive."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from rvmcv_worker.compute.archive import IMAGE_SUFFIXES
from rvmcv_worker.compute.archive_images import ArchiveImages
from rvmcv_worker.compute.coco_json import Annotation, CocoFile, CocoImage
from rvmcv_worker.compute.data_yaml import SPLITS
from rvmcv_worker.compute.faults import Fault, FaultKind
from rvmcv_worker.compute.layouts import (
    Layout,
    Parts,
    by_folder,
    common_folder,
    items_of,
    parts_of,
    plain_parts,
    split_of,
)
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.compute.report import Report
from rvmcv_worker.errors import DatasetInvalidError


@dataclass(frozen=True, slots=True)
class Labelled:
    """An image of the archive, with all that is said of it."""

    image: CocoImage
    annotations: list[Annotation]
    #: What is wrong with how it is listed.
    faults: tuple[Fault, ...] = ()


def split_of_file(name: str) -> str:
    """Return the split that a file or, if it is not, the folder around it is called after."""
    path = PurePosixPath(name)
    of_words = (split_of(word) for word in re.split(r"[-_. ]+", path.stem))
    return next(filter(None, of_words), "") or by_folder(path.parts)[0]


class Listing:
    """What the files list, brought together with what the archive has."""

    def __init__(self, files: Sequence[str], report: Report) -> None:
        self._report = report
        self._all = [name for name in files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
        self._images = ArchiveImages(self._all)
        self._missing = 0
        #: Split ("" for none) -> image -> the file that lists it.
        self._splits: dict[str, dict[str, str]] = defaultdict(dict)
        self.labelled: dict[str, Labelled] = {}

    def add(self, coco: CocoFile) -> None:
        """Take what one file lists."""
        split = split_of_file(coco.name)
        name_of_id: dict[str, str] = {}
        unclear: set[str] = set()
        for image in coco.images:
            if name_of_id.setdefault(image.id, image.file_name) != image.file_name:
                unclear.add(image.id)
        named: dict[str, Parts] = {}
        seen: set[CocoImage] = set()
        found = [(image, self._images.find(image.file_name, coco.name, split)) for image in coco.images]
        # Those whose whole path fits come first: an image is not another's by the end of its path.
        for image, match in sorted(found, key=lambda pair: pair[1] is None or not pair[1][1]):
            path = match[0] if match else ""
            wanted = plain_parts(image.file_name)
            if not path or named.setdefault(path, wanted) != wanted:
                self._report.faults.add(coco.name, Fault(FaultKind.IMAGE_MISSING, image.file_name))
                self._missing += 1
                continue
            annotations = [] if image in seen else coco.annotations.get(image.id, [])
            self._label(path, image, annotations, unclear=image.id in unclear)
            seen.add(image)
            self._splits[split or by_folder(parts_of(path))[0]].setdefault(path, coco.name)
        for image_id, annotations in coco.annotations.items():
            if image_id not in name_of_id:
                for annotation in annotations:
                    particulars = f"annotation {annotation.id}: image_id {image_id}"
                    self._report.faults.add(coco.name, Fault(FaultKind.ORPHAN, particulars))

    def _label(self, path: str, image: CocoImage, annotations: list[Annotation], *, unclear: bool) -> None:
        known = self.labelled.get(path)
        if unclear:
            fault = Fault(FaultKind.IMAGE_UNCLEAR, f"id {image.id}")
            self.labelled[path] = Labelled(image, [], (fault,))
        elif known is None:
            self.labelled[path] = Labelled(image, annotations)
        elif (known.image.height, known.image.width) != (image.height, image.width):
            self.labelled[path] = Labelled(image, [], (Fault(FaultKind.IMAGE_UNCLEAR, "two sizes"),))
        elif not known.faults:
            both = known.annotations + annotations
            self.labelled[path] = Labelled(image, both, (Fault(FaultKind.LISTED_AGAIN),))
        else:
            known.annotations.extend(annotations)

    def layout(self) -> Layout:
        """Return which image goes where; raises `DatasetInvalidError` when there is none."""
        splits = dict(self._splits)
        warnings = []
        without = splits.pop("", {})
        if not set(splits) - {"test"}:
            splits["train"] = without
        elif without:
            first = printable(next(iter(without)))
            warnings.append(f"{len(without)} image(s) outside the splits are not used, as '{first}'")
        if not any(splits.values()):
            raise DatasetInvalidError(
                f"none of the {self._missing} images that COCO files list is in the archive: "
                f"{self._report.faults.first(3) or 'they list none'}"
            )
        unlisted = [name for name in self._all if name not in self.labelled]
        if unlisted:
            first = printable(unlisted[0])
            warnings.append(f"{len(unlisted)} image(s) that no COCO file lists are not used, as '{first}'")
        items, described = {}, []
        for split in SPLITS:
            if listed := splits.get(split):
                folder = common_folder(list(listed))
                items[split] = items_of([(folder, image) for image in listed], listed.get)
                shown = [printable(name) for name in sorted(set(listed.values()))]
                described.append(f"{split}: {' + '.join(shown[:5])}")
        return Layout(items, "; ".join(described), tuple(warnings), self._missing)
