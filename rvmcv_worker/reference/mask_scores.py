"""What a fine-tuning of SAM2 came to: its model beside the one it began with, and a box taken as mask."""

from __future__ import annotations

from typing import Any

from rvmcv_worker.reference.tables import Job
from rvmcv_worker.reference.wire import Response

#: Measure -> how people call it.
_MEASURES = {"miou": "mIoU with boxes", "miou_click": "mIoU with one click", "boundary_f": "boundary F"}


class MaskScore(Response):
    """One measure on the val split, 0 to 1; null where it was not measured, or is no such number."""

    measure: str
    model: float | None
    base: float | None
    box_as_mask: float | None
    active: float | None


class MaskScores(Response):
    """As the newest epoch was measured, or the result."""

    scores: list[MaskScore]
    #: Whether it is better than what it began with; null before it is over.
    improved: bool | None
    #: The worker's sentence about that.
    verdict: str | None


def mask_scores(job: Job) -> MaskScores | None:
    """Return what is known; None for other jobs, and before anything was measured."""
    if job.job_type != "sam2":
        return None
    metrics = (job.result or {}).get("metrics") or (job.progress or {}).get("metrics")
    if not isinstance(metrics, dict):
        return None
    scores = [
        MaskScore(
            measure=name,
            model=_number(metrics.get(key)),
            base=_of("base", key, metrics),
            box_as_mask=_of("box_as_mask", key, metrics),
            active=_of("active", key, metrics),
        )
        for key, name in _MEASURES.items()
    ]
    improved, verdict = metrics.get("improved"), metrics.get("verdict")
    return MaskScores(
        scores=scores,
        improved=improved if isinstance(improved, bool) else None,
        verdict=verdict if isinstance(verdict, str) else None,
    )


def _of(whose: str, key: str, metrics: dict[str, Any]) -> float | None:
    """Return another's measure: a result has it in an object of its own, progress under ``base/miou``."""
    nested = metrics.get(whose)
    return _number(nested.get(key) if isinstance(nested, dict) else metrics.get(f"{whose}/{key}"))


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= 1 else None
