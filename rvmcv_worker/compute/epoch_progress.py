"""How far a training of epochs is, as the protocol's progress: fraction, history, time left, time limit."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rvmcv_worker.compute.checkpoint_file import HISTORY_EPOCHS, State
from rvmcv_worker.compute.child import Child

#: Least time between two messages that tell no finished epoch.
_LIGHT_INTERVAL_S = 1.0


class EpochProgress:
    """What a training has reached, for those who know how it trains; what earlier attempts did counts."""

    def __init__(self, child: Child, epochs: int, time_limit_h: float | None, earlier: State) -> None:
        self.epochs = epochs
        self.epochs_done = earlier.epochs
        #: What was told of this child's last epochs.
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY_EPOCHS)
        self._earlier = earlier
        self._hit_time_limit = False
        self._child = child
        self._limit_s = None if time_limit_h is None else time_limit_h * 3600 - earlier.trained_s
        self._fraction = self._start_fraction = min(earlier.epochs / epochs, 1.0)
        self._started_s = self._reported_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since this child began to train."""
        return time.monotonic() - self._started_s

    def ended_by(self, epochs_done: int) -> str:
        """Why a training that ended after so many did: ``time_limit``, ``epochs`` or ``patience``."""
        if self._earlier.ended_by:
            return self._earlier.ended_by
        if self._hit_time_limit:
            return "time_limit"
        return "epochs" if epochs_done >= self.epochs else "patience"

    def begin(self, message: str) -> None:
        """Say where the training begins, and what is done first where it is at the beginning."""
        done = self.epochs_done
        self._report(epoch=done, message=f"going on after epoch {done}" if done else message)
        for entries in self._earlier.history_again():
            self._report(history=entries)

    def _start_clock(self) -> None:
        """Begin to count this child's time: what comes before an epoch is not training."""
        self._started_s = time.monotonic()

    def _is_over_time(self, *, last: bool) -> bool:
        """Look at the clock after a batch; after the very `last` the training has ended by itself."""
        if self._limit_s is not None and self.elapsed_s >= self._limit_s and not last:
            self._hit_time_limit = True
        return self._hit_time_limit

    def _finish_epoch(self, entry: dict[str, Any], **progress: Any) -> None:
        """Report a finished epoch, as it stands in the history."""
        self.history.append(entry)
        told = {key: entry[key] for key in ("epoch", "losses", "metrics", "eta_s")}
        self._report(**progress, history=[entry], **told)

    def _advance(self, fraction: float) -> None:
        self._fraction = min(max(self._fraction, fraction), 1.0)

    def _eta_s(self) -> float | None:
        """Seconds until the last epoch is done or the time limit passed; None before anything is known."""
        done = self._fraction - self._start_fraction
        if not done:
            return None
        elapsed_s = self.elapsed_s
        eta_s = elapsed_s / done * (1 - self._fraction)
        if self._limit_s is not None:
            eta_s = min(eta_s, max(self._limit_s - elapsed_s, 0.0))
        return round(eta_s, 1)

    def _is_light_due(self) -> bool:
        """Whether it is time for a message that tells no finished epoch."""
        return time.monotonic() - self._reported_s >= _LIGHT_INTERVAL_S

    def _report(self, **progress: Any) -> None:
        self._reported_s = time.monotonic()
        self._child.report(
            **{"phase": "train", "fraction": round(self._fraction, 4), "epochs": self.epochs, **progress}
        )
