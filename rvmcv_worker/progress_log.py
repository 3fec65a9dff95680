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
        self._has_epochs = False

    def tell(self, state: Mapping[str, Any]) -> None:
        """Log `state` if there is something to say, or a minute is over; a child may have said anything."""
        now_s = time.monotonic()
        is_first_epoch = bool(state.get("epoch")) and not self._has_epochs
        phase = state.get("phase")
        is_known = isinstance(phase, str) and phase in self._phases
        if is_known and now_s < self._next_s and not is_first_epoch:
            return
        progress = progress_of({**state, "history": []})
        if progress.phase is None:
            return
        if progress.phase not in self._phases:
            # The figures are still those of the phase before.
            named = event(Event.JOB_PROGRESS, self._job_id, phase=progress.phase.value)
            named.info("{}", progress.phase.value)
        elif now_s >= self._next_s or (progress.phase is Phase.TRAIN and progress.epoch and is_first_epoch):
            self._has_epochs = self._has_epochs or is_first_epoch
            self._tell_figures(progress, progress.phase)
        else:
            return
        self._phases.add(progress.phase)
        self._next_s = now_s + self._every_s

    def _tell_figures(self, progress: Progress, phase: Phase) -> None:
        metric = metric_of(progress.metrics)
        event(
            Event.JOB_PROGRESS,
            self._job_id,
            phase=phase.value,
            fraction=progress.fraction,
            epoch=progress.epoch,
            epochs=progress.epochs,
            images_done=progress.images_done,
            images_total=progress.images_total,
            eta_s=progress.eta_s,
            metric=metric and metric[0],
            metric_value=metric and metric[1],
        ).info("{}", ", ".join(_parts(progress, phase, metric)))


def _parts(progress: Progress, phase: Phase, metric: tuple[str, float] | None) -> list[str]:
    parts = [phase.value]
    if phase is Phase.TRAIN and progress.epoch is not None:
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
        if isinstance(value, (int, float)) and 0 <= value <= 1:  # a child may say 1e999 or NaN
            return name, round(float(value), 4)
    return None


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
