"""Does a backend say the same of a picture as the reference, torch in fp32?

Compared are the head's numbers at each anchor that either side detects something at, after its own threshold
and suppression. Anchors have the same index on both sides, so nothing has to be matched by overlap, and what
only one side keeps is judged too: when its numbers agree, it was kept by a hair's breadth, and is a flip.
A picture without detections is compared at the reference's best anchors, so that none passes unseen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ultralytics.utils import nms, ops

from rvmcv_worker.compute.backends import Raw

#: How far a box may be off: so many pixels, or this share of its longer side, whichever is more.
BOX_PX, BOX_SHARE = 1.0, 0.005
#: How far a score may be off.
SCORE = 0.02
_TIE = 1e-5
#: Least overlap of two masks of one object, where they differ in more than a few pixels of the prototypes.
MASK_IOU, _MASK_PX = 0.9, 4

CONFIDENCE, IOU, _MAX_DETECTIONS = 0.25, 0.7, 300
#: Anchors compared where nothing is detected.
_BEST = 10


@dataclass(frozen=True)
class Comparison:
    """The largest differences found, in pictures taken together by `+`."""

    passed: bool = True
    #: Anchors compared, those of them that are detections, and those that only one side detects.
    compared: int = 0
    detections: int = 0
    flips: int = 0
    #: Largest distance between two edges of a box, in pixels, and as a share of its longer side.
    box_px: float = 0.0
    box_share: float = 0.0
    score: float = 0.0
    #: Anchors of another class.
    classes: int = 0
    mask_iou: float = 1.0

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            passed=self.passed and other.passed,
            compared=self.compared + other.compared,
            detections=self.detections + other.detections,
            flips=self.flips + other.flips,
            box_px=max(self.box_px, other.box_px),
            box_share=max(self.box_share, other.box_share),
            score=max(self.score, other.score),
            classes=self.classes + other.classes,
            mask_iou=min(self.mask_iou, other.mask_iou),
        )


def compare(reference: Raw, candidate: Raw, *, classes: int) -> Comparison:
    """Compare what two backends say of one picture."""
    if reference.predictions.shape != candidate.predictions.shape or not _finite(candidate):
        return Comparison(passed=False)
    kept, kept_by_candidate = _kept(reference, classes), _kept(candidate, classes)
    anchors = torch.unique(torch.cat((kept, kept_by_candidate)))
    both = int(torch.isin(kept, kept_by_candidate).sum())
    detections, flips = len(anchors), len(anchors) - both

    expected, found = reference.predictions[0].float().T, candidate.predictions[0].float().T
    if not detections:
        anchors = expected[:, 4 : 4 + classes].amax(1).topk(min(_BEST, len(expected))).indices
    expected, found = expected[anchors], found[anchors]

    boxes = ops.xywh2xyxy(expected[:, :4])
    distance = (boxes - ops.xywh2xyxy(found[:, :4])).abs().amax(1)
    size = expected[:, 2:4].amax(1).clamp(min=1e-6)
    boxes_agree = distance <= torch.clamp(size * BOX_SHARE, min=BOX_PX)

    scores, found_scores = expected[:, 4 : 4 + classes], found[:, 4 : 4 + classes]
    best, class_ids = scores.max(1, keepdim=True)
    found_ids = found_scores.argmax(1, keepdim=True)
    score = (best - found_scores.gather(1, class_ids)).abs()
    # Two classes that the reference finds equally likely may change places, and where nothing is detected,
    # and so no class is told, also two that are nearly so.
    same = (class_ids == found_ids) | (best - scores.gather(1, found_ids) <= (_TIE if detections else SCORE))

    overlap, masks_agree = _masks(reference, candidate, expected, found, boxes, 4 + classes)
    return Comparison(
        passed=bool(boxes_agree.all() and (score <= SCORE).all() and same.all() and masks_agree),
        compared=len(anchors),
        detections=detections,
        flips=flips,
        box_px=float(distance.max()),
        box_share=float((distance / size).max()),
        score=float(score.max()),
        classes=int((~same).sum()),
        mask_iou=overlap,
    )


def _finite(raw: Raw) -> bool:
    return all(
        bool(torch.isfinite(part).all()) for part in (raw.predictions, raw.prototypes) if part is not None
    )


def _kept(raw: Raw, classes: int) -> torch.Tensor:
    """Return the anchors of the detections."""
    _, kept = nms.non_max_suppression(
        raw.predictions.float(), CONFIDENCE, IOU, max_det=_MAX_DETECTIONS, nc=classes, return_idxs=True
    )
    anchors: torch.Tensor = kept[0].flatten().long()
    return anchors


def _masks(
    reference: Raw,
    candidate: Raw,
    expected: torch.Tensor,
    found: torch.Tensor,
    boxes: torch.Tensor,
    first: int,
) -> tuple[float, bool]:
    """Return the least overlap of two masks, within the reference's boxes, and whether all agree."""
    if reference.prototypes is None or candidate.prototypes is None:
        return 1.0, True
    worst, agree = 1.0, True
    prototypes = reference.prototypes[0].float(), candidate.prototypes[0].float()
    shape = 4 * prototypes[0].shape[1], 4 * prototypes[0].shape[2]
    one, other = (
        ops.process_mask(prototype, rows[:, first:], boxes, shape).bool()
        for prototype, rows in zip(prototypes, (expected, found), strict=True)
    )
    different = (one ^ other).sum((1, 2))
    overlap = (one & other).sum((1, 2)) / (one | other).sum((1, 2)).clamp(min=1)
    judged = different > _MASK_PX
    if judged.any():
        worst = float(overlap[judged].min())
        agree = worst >= MASK_IOU
    return worst, agree
