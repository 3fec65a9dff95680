"""What a COCO file says of one image, judged as a label file of YOLO's is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rvmcv_worker.compute.coco_json import Annotation, CocoImage
from rvmcv_worker.compute.coco_segmentation import Pieces
from rvmcv_worker.compute.faults import Effect, Fault, FaultKind
from rvmcv_worker.compute.instances import Instance
from rvmcv_worker.compute.labels import MAX_FAULTS, MIN_AREA, Label
from rvmcv_worker.compute.polygons import area, crosses_itself
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.compute.rle import Rle

#: By how much of a side a vertex may lie outside, as in label files of YOLO's.
_TOLERANCE = 0.01
#: How much longer one side must be for a turned size to be told from a good one.
_OBLONG = 1.02
_MIN_POINTS = 3


def judge(
    image: CocoImage,
    annotations: Sequence[Annotation],
    class_ids: Mapping[int, int],
    size: tuple[int, int] | None,
) -> Label:
    """Return the label of an image; `class_ids` has the class of each category's id.

    `size` is (height, width) of the upright image; None for an image that could not be decoded, of which
    only the faults matter.
    """
    told = (image.height or 0, image.width or 0) if (image.height, image.width) != (None, None) else size
    if told is None:
        return Label(classes=(), faults=())
    if fault := _judge_size(told, size or told):
        faults = [fault]
        if fault.kind.effect is Effect.IMAGE:
            return Label(classes=(), faults=(fault,))
    else:
        faults = []
    kept: list[Instance] = []
    seen: set[tuple[int, bytes]] = set()
    for annotation in annotations:
        instance, found = _judge(annotation, class_ids, told, size or told)
        faults += [
            Fault(
                fault.kind,
                f"annotation {annotation.id}{': ' if fault.particulars else ''}{fault.particulars}",
            )
            for fault in found
        ]
        if instance is None:
            continue
        key = (instance.class_id, _content(annotation))
        if key in seen:
            faults.append(Fault(FaultKind.DUPLICATE_OBJECT, f"annotation {annotation.id}"))
            continue
        seen.add(key)
        kept.append(instance)
    left_out = [fault for fault in faults if fault.kind.effect is Effect.LINE]
    if not kept and any(fault.kind is not FaultKind.CROWD for fault in left_out):
        faults.append(Fault(FaultKind.NOTHING_LEFT, left_out[0].reason))
    faults.sort(key=lambda fault: list(Effect).index(fault.kind.effect))
    if any(fault.kind.effect is Effect.IMAGE for fault in faults):
        kept = []
    return Label(
        classes=tuple(instance.class_id for instance in kept),
        faults=tuple(faults[:MAX_FAULTS]),
        instances=tuple(kept),
    )


def _judge_size(told: tuple[int, int], size: tuple[int, int]) -> Fault | None:
    """Compare (height, width) in the file with the image's own."""
    if told == size:
        return None
    particulars = f"{told[1]} x {told[0]}, the image {size[1]} x {size[0]}"
    if min(told) <= 0:
        return Fault(FaultKind.IMAGE_SIZE_WRONG, "width and height must be whole numbers above 0")
    turned = (told[1] > told[0]) != (size[1] > size[0])
    if turned and max(told) > min(told) * _OBLONG and max(size) > min(size) * _OBLONG:
        return Fault(FaultKind.IMAGE_SIZE_WRONG, particulars)
    return Fault(FaultKind.IMAGE_SIZE_DIFFERS, particulars)


def _judge(
    annotation: Annotation, class_ids: Mapping[int, int], told: tuple[int, int], size: tuple[int, int]
) -> tuple[Instance | None, list[Fault]]:
    """Return the instance that an annotation is, None for one that does not train, and its faults."""
    shape = annotation.segmentation
    class_id = None if annotation.category is None else class_ids.get(annotation.category)
    if class_id is None:
        return None, [Fault(FaultKind.CLASS_UNKNOWN, f"category {printable(str(annotation.category), 30)}")]
    if annotation.crowd:
        return None, [Fault(FaultKind.CROWD)]
    if isinstance(shape, Fault):
        return None, [shape]
    if shape is None:
        return None, [Fault(FaultKind.NO_SEGMENTATION)]
    if isinstance(shape, Rle):
        return _judge_run_lengths(class_id, shape, (told, size))
    return _judge_pieces(class_id, shape, told)


def _judge_run_lengths(
    class_id: int, rle: Rle, sizes: Sequence[tuple[int, int]]
) -> tuple[Instance | None, list[Fault]]:
    if (rle.height, rle.width) not in sizes:
        particulars = f"of {rle.width} x {rle.height} pixels, the image has {sizes[0][1]} x {sizes[0][0]}"
        return None, [Fault(FaultKind.SEGMENTATION, particulars)]
    if rle.area == 0:
        return None, [Fault(FaultKind.EMPTY_MASK)]
    return Instance(class_id, rle=rle), []


def _judge_pieces(
    class_id: int, pieces: Pieces, told: tuple[int, int]
) -> tuple[Instance | None, list[Fault]]:
    height, width = told
    sides = np.array((width, height), np.float32)
    points = pieces.points
    if not np.isfinite(points).all():
        return None, [Fault(FaultKind.NOT_FINITE)]
    if len(points):
        low, high = (points / sides).min(axis=0), (points / sides).max(axis=0)
        shown = f"in an image of {width} x {height}"
        if low.min() < -_TOLERANCE:
            return None, [Fault(FaultKind.NEGATIVE, f"{points.min():g} {shown}")]
        if high.max() > 1 + _TOLERANCE:
            beyond = points.max(axis=0)[int(np.argmax(high))]
            return None, [Fault(FaultKind.OUT_OF_IMAGE, f"{beyond:g} {shown}")]
    polygons: list[NDArray[np.float32]] = [
        piece / sides for piece in pieces.polygons() if len(piece) >= _MIN_POINTS
    ]
    if not polygons:
        return None, [Fault(FaultKind.FEW_POINTS, f"{len(points)}")]
    faults = []
    if len(polygons) < len(pieces.begins) + 1:
        faults.append(Fault(FaultKind.PIECE))
    if any(crosses_itself(polygon) for polygon in polygons):
        faults.append(Fault(FaultKind.SELF_CROSSING))
    elif (covered := sum(area(polygon) for polygon in polygons)) < MIN_AREA:
        return None, [Fault(FaultKind.SLIVER, f"area {covered:.1e} of the image")]
    return Instance(class_id, tuple(polygons)), faults


def _content(annotation: Annotation) -> bytes:
    shape = annotation.segmentation
    if isinstance(shape, Pieces):
        return shape.points.tobytes() + b"|" + shape.begins.tobytes()
    assert isinstance(shape, Rle)
    return shape.counts.tobytes()
