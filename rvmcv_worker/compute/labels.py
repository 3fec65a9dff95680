"""One label file of YOLO's format, judged as Ultralytics will judge it, and a little more strictly.

A line is ``class x y w h`` (a box: centre and size) or ``class x1 y1 x2 y2 …`` (a polygon), all but the
class as fractions of the image's sides. Where Ultralytics' `verify_image_label` drops the image with a log
line, so do we, with a reason; the same float32 arithmetic decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rvmcv_worker.compute.faults import Effect, Fault, FaultKind
from rvmcv_worker.compute.instances import Instance
from rvmcv_worker.compute.polygons import area, crosses_itself

#: Ultralytics' tolerance of 1 %, as float32 sees it.
_MAX = float(np.float32(1.01))
_MIN = float(np.float32(-0.01))
#: Least area of a polygon, as a fraction of the image: half a pixel of 640 x 640.
MIN_AREA = 1e-6
_BOX_COLUMNS = 5
#: More than any one image's labels take.
MAX_BYTES = 4 * 1024 * 1024
#: More faults than this in one file tell nothing new.
MAX_FAULTS = 100


@dataclass(frozen=True, slots=True)
class Label:
    """What is labelled on an image, and what is wrong with it."""

    #: The class of each instance that trains; empty for a background image, and for a bad one.
    classes: tuple[int, ...]
    faults: tuple[Fault, ...]
    #: The text without the lines that were left out; None when the file can stay as it is.
    rewritten: str | None = None
    #: The instances that train, of a segmentation.
    instances: tuple[Instance, ...] = field(default=(), compare=False)

    @property
    def bad(self) -> bool:
        """Whether the image has to be left out."""
        return any(fault.kind.effect is Effect.IMAGE for fault in self.faults)


def parse_label(content: bytes, class_count: int, *, segment: bool, tell_crossings: bool = False) -> Label:
    """Judge the content of one label file of a detection, or with `segment` of a segmentation."""
    if len(content) > MAX_BYTES:
        return _bad(Fault(FaultKind.LABEL_TOO_LARGE, f"over {MAX_BYTES} bytes"))
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        return _bad(Fault(FaultKind.NOT_UTF8, line=content.count(b"\n", 0, error.start) + 1))
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    # The rule of Ultralytics: one line of more than 6 columns makes polygons of all.
    polygons = any(len(columns) > _BOX_COLUMNS + 1 for _, columns in rows)
    faults: list[Fault] = []
    if segment and rows and not polygons and all(len(columns) == _BOX_COLUMNS for _, columns in rows):
        faults.append(Fault(FaultKind.BOX_IN_SEGMENT, line=rows[0][0]))
    if polygons and not segment:
        first = next(number for number, columns in rows if len(columns) > _BOX_COLUMNS + 1)
        faults.append(Fault(FaultKind.POLYGON_IN_DETECT, line=first))

    kept: list[NDArray[np.float32]] = []
    left_out: set[int] = set()
    seen: set[bytes] = set()
    for number, columns in rows:
        kind, particulars, values = _judge(columns, class_count, polygons, segment, tell_crossings)
        if kind:
            faults.append(Fault(kind, particulars, number))
            if kind.effect is Effect.LINE:
                left_out.add(number)
            if kind.effect is not Effect.WARNING:
                continue
        key = (values + np.float32(0)).tobytes()  # -0.0 becomes 0.0
        if key in seen:
            faults.append(Fault(FaultKind.DUPLICATE, line=number))
            continue
        seen.add(key)
        kept.append(values)

    if left_out and not kept:
        faults.append(Fault(FaultKind.NOTHING_LEFT, line=rows[0][0]))
    faults.sort(key=lambda fault: list(Effect).index(fault.kind.effect))  # the decisive ones first
    if any(fault.kind.effect is Effect.IMAGE for fault in faults):
        return _bad(*faults[:MAX_FAULTS])
    text = [line for number, line in enumerate(lines, 1) if number not in left_out]
    return Label(
        classes=tuple(int(values[0]) for values in kept),
        faults=tuple(faults[:MAX_FAULTS]),
        rewritten="\n".join([*text, ""]) if left_out else None,
        instances=tuple(_instance(values) for values in kept) if polygons and segment else (),
    )


def _instance(values: NDArray[np.float32]) -> Instance:
    return Instance(int(values[0]), (values[1:].reshape(-1, 2),))


def _bad(*faults: Fault) -> Label:
    return Label(classes=(), faults=faults)


def _judge(
    columns: list[str], class_count: int, polygons: bool, segment: bool, tell_crossings: bool
) -> tuple[FaultKind | None, str, NDArray[np.float32]]:
    """Return (fault or None, particulars, the columns as float32) of one line."""
    nothing = np.empty(0, np.float32)
    count = len(columns)
    if polygons and count == _BOX_COLUMNS:
        return FaultKind.MIXED, "this line is a box, others are polygons", nothing
    if (polygons and (count < 3 or count % 2 == 0)) or (not polygons and count != _BOX_COLUMNS):
        return FaultKind.COLUMNS, f"{count} columns", nothing
    try:
        values = np.array(columns, dtype=np.float32)
    except (ValueError, OverflowError):
        return FaultKind.NOT_A_NUMBER, " ".join(columns)[:100], nothing
    if not np.isfinite(values).all():
        return FaultKind.NOT_FINITE, " ".join(columns)[:100], values
    class_id = float(values[0])
    if class_id % 1:
        return FaultKind.CLASS_NOT_INTEGER, f"class {class_id:g}", values
    if not 0 <= class_id < class_count:
        known = f"0 to {class_count - 1}"
        return (
            FaultKind.CLASS_UNKNOWN,
            f"class {class_id:.0f}, but {class_count} classes are named: {known}",
            values,
        )
    kind, particulars = (
        _judge_polygon(values, segment, tell_crossings) if polygons else _judge_box(values[1:].tolist())
    )
    return kind, particulars, values


def _judge_box(box: list[float]) -> tuple[FaultKind | None, str]:
    """Judge x, y, w, h."""
    x, y, width, height = box
    if max(box) > _MAX:
        return FaultKind.NOT_NORMALISED, f"{max(box):g}"
    if min(box) < _MIN or width < 0 or height < 0:
        return FaultKind.NEGATIVE, f"{min(box):g}"
    if width == 0 or height == 0:
        return FaultKind.ZERO_SIZE, f"{width:g} by {height:g}"
    low, high = min(x - width / 2, y - height / 2), max(x + width / 2, y + height / 2)
    if low < _MIN or high > _MAX:
        return FaultKind.OUTSIDE, f"from {low:.3f} to {high:.3f}"
    return None, ""


def _judge_polygon(
    values: NDArray[np.float32], segment: bool, tell_crossings: bool
) -> tuple[FaultKind | None, str]:
    """Judge the polygon by its box, as Ultralytics does, then by its area where the area is what trains."""
    points = values[1:].reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    size = high - low
    kind, particulars = _judge_box([*((low + high) / 2).tolist(), *size.tolist()])
    if kind and kind.effect is Effect.IMAGE:
        return kind, particulars
    if len(points) < 3:
        return FaultKind.FEW_POINTS, f"{len(points)}"
    if kind is FaultKind.ZERO_SIZE:
        return kind, particulars
    crosses = tell_crossings and crosses_itself(points)
    # The halves of an eight cancel out: it has no area by this reckoning, but is no sliver.
    if segment and not crosses and (covered := area(points)) < MIN_AREA:
        return FaultKind.SLIVER, f"area {covered:.1e} of the image"
    if crosses and kind is None:
        return FaultKind.SELF_CROSSING, ""
    return kind, particulars
