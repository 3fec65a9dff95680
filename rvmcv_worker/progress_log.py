"""How far a job is, for who reads the log: at each new phase, and then once a minute at most."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rvmcv_worker.events import Event, event
from rvmcv_worker.protocol import Phase, Progress, progress_of

_EVERY_S = 60.0
#: What a training is judged by, the first that there is; SAM2 has the second.
_METRICS = ("mAP50-95", "miou")


class ProgressLog:
    """Logs the progress of one job; whoever uses it takes turns."""

    def __init__(self, job_id: str, every_s: float = _EVERY_S) -> None:
        self._job_id = job_id
        self._every_s = every_s
        #: Told once each: a child that says one phase and the other in turn fills no log.
        self._phases: set[Phase] = set()
        self._next_s = 0.0

    def tell(self, state: Mapping[str, Any]) -> None:
        """Log `state` if there is something to say, or a minute is over; a child may have said anything."""
        now_s = time.monotonic()
        is_new = state.get("phase") not in self._phases
        if not is_new and now_s < self._next_s:
            return
        progress = progress_of({**state, "history": []})
        if progress.phase is None or (progress.phase in self._phases and now_s < self._next_s):
            return
        self._phases.add(progress.phase)
        self._next_s = now_s + self._every_s
        metric = metric_of(progress.metrics)
        event(
            Event.JOB_PROGRESS,
            self._job_id,
            phase=progress.phase.value,
            fraction=progress.fraction,
            epoch=progress.epoch,
            epochs=progress.epochs,
            images_done=progress.images_done,
            images_total=progress.images_total,
            eta_s=progress.eta_s,
            metric=metric and metric[0],
            metric_value=metric and metric[1],
        ).info("{}", ", ".join(_parts(progress, metric)))


def _parts(progress: Progress, metric: tuple[str, float] | None) -> list[str]:
    parts = [progress.phase.value if progress.phase else ""]
    if progress.phase is Phase.TRAIN and progress.epoch is not None:
        parts.append(f"epoch {progress.epoch} of {progress.epochs or '?'}")
        if metric:
            parts.append(f"{metric[0]} {metric[1]:.3f}")
    if progress.images_done is not None:
        parts.append(f"{progress.images_done} of {progress.images_total or '?'} images")
    if progress.fraction and len(parts) == 1:
        parts.append(f"{100 * progress.fraction:.0f} %")
    if progress.eta_s:
        parts.append(f"{_about(progress.eta_s)} to go")
    return parts


def metric_of(metrics: object) -> tuple[str, float] | None:
    """Return by what a training is judged, and how it did; None where there is no such thing."""
    if not isinstance(metrics, dict):
        return None
    for name in _METRICS:
        value = metrics.get(name)
        if isinstance(value, (int, float)):
            return name, round(float(value), 4)
    return None


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
