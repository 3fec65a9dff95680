"""What a SAM2 model is worth on a split, and what is said of it beside others on the same split."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, NamedTuple

from rvmcv_worker.errors import DatasetInvalidError

#: The least gain in mIoU that counts: one in the last digit that the verdict tells. Less may be rounding:
#: of features kept in fp16, of decoding in bf16, of other numbers of objects at once.
LEAST_GAIN = 0.001


class Fit(NamedTuple):
    """How well the masks of one object fit."""

    #: With the ground truth's tight box.
    iou: float
    #: With one click; None where nothing was clicked.
    iou_click: float | None
    #: Of the box's mask.
    boundary_f: float


@dataclass(frozen=True)
class Score:
    """Means over objects, not over images: SAM's own way."""

    miou: float
    #: None for a baseline that takes no click.
    miou_click: float | None
    boundary_f: float
    instances: int
    #: Objects that were too small to be measured.
    left_out: int
    #: Class name -> ``{"images", "instances", "miou", "miou_click", "boundary_f"}``, for all classes; of one
    #: without objects in the split the means are None.
    per_class: dict[str, dict[str, Any]]

    @classmethod
    def of(
        cls, fits: list[list[Fit | None]], classes: list[list[int]], names: list[str], left_out: int
    ) -> Score:
        """Return the means of each image's objects, whose classes are in `classes`.

        Those without a fit (None) add to the `left_out`. Raises `DatasetInvalidError` where none has one.
        """
        images: dict[int, set[int]] = defaultdict(set)
        by_class: dict[int, list[Fit]] = defaultdict(list)
        for image, (its_fits, its_classes) in enumerate(zip(fits, classes, strict=True)):
            for fit, class_id in zip(its_fits, its_classes, strict=True):
                if fit is None:
                    left_out += 1
                else:
                    images[class_id].add(image)
                    by_class[class_id].append(fit)
        everything = [fit for some in by_class.values() for fit in some]
        if not everything:
            raise DatasetInvalidError(
                "no object of the split has a pixel at the size that masks are measured at; label larger ones"
            )
        per_class = {
            name: {
                "images": len(images[class_id]),
                "instances": len(by_class[class_id]),
                **_means(by_class[class_id]),
            }
            for class_id, name in enumerate(names)
        }
        return cls(**_means(everything), instances=len(everything), left_out=left_out, per_class=per_class)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    def flat(self, prefix: str = "") -> dict[str, float]:
        """Return the means by name, as ``base/miou`` for the prefix ``base/``; those that there are."""
        means = {"miou": self.miou, "miou_click": self.miou_click, "boundary_f": self.boundary_f}
        return {f"{prefix}{name}": value for name, value in means.items() if value is not None}


def improved(best: Score, base: Score) -> bool:
    """Tell whether `best` is better than the model that it was made from: with boxes, as it is served."""
    return best.miou - base.miou >= LEAST_GAIN


def verdict(best: Score, base: Score, box_as_mask: Score) -> str:
    """Return the sentence that an admin reads before a fine-tuned model is activated."""
    figures = (
        f"mIoU with boxes {best.miou:.3f} (base {base.miou:.3f}, the box itself {box_as_mask.miou:.3f})"
        f"{_click(best, base)}, boundary F {best.boundary_f:.3f} (base {base.boundary_f:.3f}); "
        f"{best.instances} object{'s' if best.instances != 1 else ''}"
    )
    look = "do not activate it without looking at masks.jpg"
    if not improved(best, base):
        return f"NOT better than the base model on val: {figures}; {look}"
    if best.miou <= box_as_mask.miou:
        return f"better than the base model on val, but not than the box itself: {figures}; {look}"
    return f"better than the base model on val: {figures}"


def report(best: Score, base: Score, box_as_mask: Score, best_epoch: int) -> dict[str, Any]:
    """Return what a result says under ``metrics``: the best epoch, with the base and the box beside it."""
    return {
        **best.to_dict(),
        "fitness": best.miou,
        "base": base.to_dict(),
        "box_as_mask": box_as_mask.to_dict(),
        "improved": improved(best, base),
        "verdict": verdict(best, base, box_as_mask),
        "best_epoch": best_epoch,
    }


def _click(best: Score, base: Score) -> str:
    if best.miou_click is None or base.miou_click is None:
        return ""
    return f", with one click {best.miou_click:.3f} (base {base.miou_click:.3f})"


def _means(fits: list[Fit]) -> dict[str, Any]:
    if not fits:
        return {"miou": None, "miou_click": None, "boundary_f": None}
    clicked = [fit.iou_click for fit in fits if fit.iou_click is not None]
    return {
        "miou": fmean(fit.iou for fit in fits),
        "miou_click": fmean(clicked) if clicked else None,
        "boundary_f": fmean(fit.boundary_f for fit in fits),
    }
