"""A SAM2 training as the protocol's progress: one message an epoch, light ones in between, all rising."""

from __future__ import annotations

import time
from typing import Any

from rvmcv_worker.compute.checkpoint_file import State
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.epoch_progress import EpochProgress
from rvmcv_worker.compute.sam2_score import Score


class Sam2Progress(EpochProgress):
    """What a training has reached; it says so, and when its time is over.

    An epoch that is cut by the time limit is measured and counted as any other. What comes before the first
    step (encoding the val split, measuring the base model) does not count.
    """

    def __init__(self, child: Child, epochs: int, time_limit_h: float | None, earlier: State) -> None:
        super().__init__(child, epochs, time_limit_h, earlier)
        self._phase = "train"
        self._doing = ""
        self._epoch_started_s = 0.0

    @property
    def is_out_of_time(self) -> bool:
        """Whether the time limit ends the training."""
        return self._hit_time_limit

    def say(self, message: str) -> None:
        """Say something at once, in the log too."""
        _log(message)
        self._tell(message)

    def encode(self, split: str) -> None:
        """Say which images are encoded from now on."""
        self._do(f"encoding the images of {split}")

    def encoded(self, done: int, total: int, left_s: float) -> None:
        """Say once a second how far that is."""
        if self._is_light_due():
            self._tell(f"{self._doing}: {done} of {total}, {left_s:.0f} s left")

    def measure(self, what: str) -> None:
        """Say what is measured from now on."""
        self._do(f"measuring {what} on val")

    def tick(self, done: int, total: int) -> None:
        """Say once a second how far that is."""
        if self._is_light_due():
            self._tell(f"{self._doing}: image {done} of {total}")

    def evaluate(self, what: str) -> None:
        """Say what is measured after the training."""
        self._fraction = 1.0
        self._phase = "evaluate"
        self._do(f"measuring {what}")

    def start(self) -> None:
        """Start the clock."""
        self._start_clock()

    def start_epoch(self) -> None:
        """Begin an epoch."""
        self._epoch_started_s = time.monotonic()
        self._doing = f"measuring epoch {self.epochs_done + 1} on val"

    def step(self, done: int, steps: int) -> bool:
        """Tell after a step whether the time is over; say how far it is, once a second."""
        is_over = self._is_over_time(last=self.epochs_done + 1 >= self.epochs and done >= steps)
        if self._is_light_due():
            self._advance((self.epochs_done + done / steps) / self.epochs)
            epoch = min(self.epochs_done + 1, self.epochs)
            self._report(epoch=epoch, eta_s=self._eta_s(), message=f"epoch {epoch}: step {done} of {steps}")
        return is_over

    def finish_epoch(
        self, losses: dict[str, float], score: Score, beside: dict[str, float], *, lr: float, is_last: bool
    ) -> dict[str, Any]:
        """Report a finished epoch and return its entry in the history.

        `beside` are the metrics of what the model is compared with; `is_last` where no epoch follows.
        """
        self.epochs_done += 1
        self._advance(self.epochs_done / self.epochs)
        entry = {
            "epoch": self.epochs_done,
            "epochs": self.epochs,
            "losses": losses,
            "metrics": {**score.flat(), **beside},
            "lr": lr,
            "epoch_s": round(time.monotonic() - self._epoch_started_s, 3),
            "eta_s": 0.0 if is_last else self._eta_s(),
        }
        message = (
            f"epoch {self.epochs_done} of {self.epochs}: loss {losses['total']:.4f}, mIoU {score.miou:.4f}"
        )
        _log(message)
        self._finish_epoch(entry, message=message)
        return entry

    def _do(self, what: str) -> None:
        self._doing = what
        self.say(what)

    def _tell(self, message: str) -> None:
        self._report(phase=self._phase, epoch=self.epochs_done, message=message)


def _log(message: str) -> None:
    print(message, flush=True)  # noqa: T201  what a child prints is the job's log
