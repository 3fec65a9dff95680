"""What can be wrong with a picture or a label, and what the preflight does about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rvmcv_worker.compute.printable import printable

#: How many faults of each effect a report lists; all are counted.
MAX_LISTED = 1000


class Effect(str, Enum):
    """What a fault does to the data set."""

    #: The image and its label file take no part in the training.
    IMAGE = "image left out"
    #: The line is taken out of the label file; the image stays.
    LINE = "line left out"
    #: Nothing is changed.
    WARNING = "warning"


class FaultKind(Enum):
    """Each kind of fault with its code, its effect, and what it means."""

    LABEL_TOO_LARGE = "label_too_large", Effect.IMAGE, "a label file too large for one image"
    NOT_UTF8 = "label_not_utf8", Effect.IMAGE, "the label file is not UTF-8 text"
    COLUMNS = "column_count", Effect.IMAGE, "a line has neither 5 columns (box) nor 1 + 2n (polygon)"
    NOT_A_NUMBER = "not_a_number", Effect.IMAGE, "a column is not a number"
    NOT_FINITE = "not_finite", Effect.IMAGE, "a column is NaN or infinite"
    CLASS_NOT_INTEGER = "class_not_integer", Effect.IMAGE, "the class id has a fraction"
    CLASS_UNKNOWN = "class_out_of_range", Effect.IMAGE, "the class id has no name in the data set"
    NEGATIVE = "negative", Effect.IMAGE, "a coordinate or a size lies below 0"
    NOT_NORMALISED = "out_of_bounds", Effect.IMAGE, "a coordinate lies above 1: pixels in place of fractions?"
    OUT_OF_IMAGE = "out_of_bounds", Effect.IMAGE, "a coordinate lies beyond the image's width or height"
    MIXED = "mixed_box_polygon", Effect.IMAGE, "boxes and polygons in one label file"
    BOX_IN_SEGMENT = "box_in_segment", Effect.IMAGE, "boxes where a segmentation needs polygons"
    NOTHING_LEFT = "nothing_left", Effect.IMAGE, "no usable line is left: it would train as background"
    SEGMENTATION = (
        "segmentation_unreadable",
        Effect.IMAGE,
        "a COCO segmentation that is neither polygons nor run lengths",
    )
    IMAGE_MISSING = "image_missing", Effect.IMAGE, "a COCO file names an image that the archive does not have"
    IMAGE_UNCLEAR = (
        "image_unclear",
        Effect.IMAGE,
        "a COCO file has two images of one id, or one image in two sizes: which is meant is not known",
    )
    IMAGE_SIZE_WRONG = (
        "image_size_wrong",
        Effect.IMAGE,
        "the size in the COCO file is no size, or that of the image turned by 90 degrees",
    )
    FEW_POINTS = "polygon_points", Effect.LINE, "a polygon of fewer than 3 points"
    ZERO_SIZE = "zero_size_box", Effect.LINE, "a box without width or height"
    SLIVER = "sliver_polygon", Effect.LINE, "a polygon that covers no area"
    NO_SEGMENTATION = "no_segmentation", Effect.LINE, "an annotation of a box alone"
    CROWD = "crowd", Effect.LINE, "many objects in one annotation (iscrowd)"
    EMPTY_MASK = "empty_mask", Effect.LINE, "run lengths that cover no pixel"
    ORPHAN = "annotation_without_image", Effect.LINE, "an annotation of an image that its file does not list"
    DUPLICATE = "duplicate_line", Effect.WARNING, "the same line again; Ultralytics takes it once"
    OUTSIDE = "outside_image", Effect.WARNING, "reaches beyond the edge of the image"
    DUPLICATE_OBJECT = "duplicate_object", Effect.WARNING, "the same annotation again; it is taken once"
    PIECE = (
        "piece_left_out",
        Effect.WARNING,
        "a piece of an object with fewer than 3 points; the others are taken",
    )
    LISTED_AGAIN = (
        "image_listed_again",
        Effect.WARNING,
        "an image that is listed twice; what is labelled on it is taken together",
    )
    IMAGE_SIZE_DIFFERS = (
        "image_size_differs",
        Effect.WARNING,
        "the size in the COCO file is not the image's; what is labelled is scaled to the image",
    )
    SELF_CROSSING = (
        "self_crossing",
        Effect.WARNING,
        "a polygon that crosses itself; what it goes around twice is a hole",
    )
    POLYGON_IN_DETECT = "polygon_in_detect", Effect.WARNING, "a polygon in a detection; its box is used"
    NOT_AN_IMAGE = "image_unreadable", Effect.IMAGE, "not an image of a known format"
    TRUNCATED = "image_damaged", Effect.IMAGE, "the image cannot be decoded to its end"
    TOO_SMALL = "image_too_small", Effect.IMAGE, "a side shorter than 10 pixels"
    TOO_LARGE = "image_too_large", Effect.IMAGE, "more pixels than the worker takes"
    RESTORED = (
        "image_restored",
        Effect.WARNING,
        "a JPEG with something after its end, written anew as Ultralytics does",
    )

    def __init__(self, code: str, effect: Effect, sentence: str) -> None:
        self.code = code
        self.effect = effect
        self.sentence = sentence


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault at one place."""

    kind: FaultKind
    #: Particulars, as "class 89 of 80"; may hold a stranger's text.
    particulars: str = ""
    #: 1 for the first line; None where the file as a whole is meant.
    line: int | None = None

    @property
    def reason(self) -> str:
        """The sentence of the kind, with the particulars."""
        return (
            f"{self.kind.sentence} ({printable(self.particulars, 120)})"
            if self.particulars
            else self.kind.sentence
        )


class FaultLog:
    """All faults of a data set, counted; the first of each effect kept."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._kept: dict[Effect, list[dict[str, Any]]] = {effect: [] for effect in Effect}

    def add(self, file: str, fault: Fault) -> None:
        """Note a fault in `file`, whose path is that in the archive."""
        self.counts[fault.kind.code] += 1
        kept = self._kept[fault.kind.effect]
        if len(kept) < MAX_LISTED:
            kept.append(
                {
                    "file": printable(file),
                    "line": fault.line,
                    "code": fault.kind.code,
                    "reason": fault.reason,
                    "effect": fault.kind.effect.value,
                }
            )

    def listed(self, max_listed: int = MAX_LISTED) -> list[dict[str, Any]]:
        """Return the first faults, those that cost an image before those that cost a line."""
        return [fault for effect in Effect for fault in self._kept[effect]][:max_listed]

    def first(self, count: int) -> str:
        """Return the first faults, one a file, as text: ``a.txt:3: reason; b.txt:1: reason``."""
        by_file: dict[str, str] = {}
        for fault in self.listed():
            line = f":{fault['line']}" if fault["line"] else ""
            by_file.setdefault(fault["file"], f"{fault['file']}{line}: {fault['reason']}")
            if len(by_file) == count:
                break
        return "; ".join(by_file.values())
