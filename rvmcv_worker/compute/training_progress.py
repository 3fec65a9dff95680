"""Turns Ultralytics' callbacks into the protocol's progress: one message for each epoch, rising."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rvmcv_worker.compute.checkpoint_file import State
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.epoch_progress import EpochProgress
from rvmcv_worker.compute.training_figures import box_and_mask


class TrainingProgress(EpochProgress):
    """What a training has reached; it reports, ends it on request, and stops it at its time limit.

    Raising from a callback ends a training at once: `Child.check_stop` is asked after every batch, of the
    training and of each validation. The time limit only sets ``trainer.stop``: the epoch is cut after the
    batch, then validated and saved as any other; with several ranks the epoch is trained to its end. What
    earlier attempts did and took (`earlier`) counts.
    """

    def __init__(self, child: Child, epochs: int, time_limit_h: float | None, earlier: State) -> None:
        super().__init__(child, epochs, time_limit_h, earlier)
        self.started = False
        #: As it is now: Ultralytics halves it by itself when the first epoch does not fit into the GPU.
        self.batch_size: int | None = None
        self._batch = 0
        self._epoch_is_open = False

    def attach(self, yolo: Any) -> None:
        """Listen to what `yolo` does from now on, trainings and validations.

        A rank other than 0, which knows of no metrics, only heeds the wish to stop.
        """
        if self._child.rank:
            yolo.add_callback("on_train_batch_end", self._check_stop)
            yolo.add_callback("on_val_batch_end", self._check_stop)
            return
        for event in (
            "on_pretrain_routine_start",
            "on_pretrain_routine_end",
            "on_train_start",
            "on_train_epoch_start",
            "on_train_batch_end",
            "on_train_epoch_end",
            "on_fit_epoch_end",
            "on_val_start",
            "on_val_batch_end",
        ):
            yolo.add_callback(event, getattr(self, event, self._check_stop))

    def _check_stop(self, _source: Any) -> None:
        self._child.check_stop()

    def on_train_start(self, _trainer: Any) -> None:
        """Start the clock: reading the labels does not count."""
        self.started = True
        self._start_clock()

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Count batches anew; fires again for an epoch that is repeated (out of memory, NaN)."""
        self._batch = 0
        if trainer.batch_size != self.batch_size:
            self.batch_size = trainer.batch_size
            self._report(epoch=self.epochs_done, batch_size=trainer.batch_size)

    def on_train_batch_end(self, trainer: Any) -> None:
        """Stop if asked to; say how far it is, at most once a second."""
        self._child.check_stop()
        self._batch += 1
        is_last = trainer.epoch + 1 >= self.epochs and self._batch >= len(trainer.train_loader)
        if self._is_over_time(last=is_last):
            # Several ranks hear of it at the end of the epoch: one that stopped alone would be waited for.
            trainer.stop = self._child.rank is None
        if self._is_light_due():
            self._advance((trainer.epoch + self._batch / len(trainer.train_loader)) / self.epochs)
            self._report(epoch=min(trainer.epoch + 1, self.epochs), eta_s=self._eta_s(), message=None)

    def on_train_epoch_end(self, _trainer: Any) -> None:
        """Note that an epoch now waits for its validation."""
        self._epoch_is_open = True

    def on_fit_epoch_end(self, trainer: Any) -> None:
        """Report a finished epoch, once.

        Ultralytics fires this once more after the last epoch, for its evaluation of best.pt.
        """
        if not self._epoch_is_open or trainer.epoch + 1 <= self.epochs_done:
            return
        self._epoch_is_open = False
        self.epochs_done = trainer.epoch + 1
        trainer.stop = trainer.stop or self._hit_time_limit
        self._advance(self.epochs_done / self.epochs)
        validated = {key: float(value) for key, value in trainer.metrics.items()}
        entry = {
            "epoch": self.epochs_done,
            "epochs": self.epochs,
            "losses": _group(trainer.label_loss_items(trainer.tloss), "train/"),
            "val_losses": _group(validated, "val/"),
            "metrics": box_and_mask(validated),
            "lr": float(trainer.lr["lr/pg0"]),
            "epoch_s": round(trainer.epoch_time, 3),
            "eta_s": 0.0 if trainer.stop else self._eta_s(),
        }
        self._finish_epoch(entry, batch_size=trainer.batch_size, message=None)

    def on_val_start(self, validator: Any) -> None:
        """Say when the measuring after the training begins; those within it belong to their epoch."""
        self._child.check_stop()
        if not validator.training:
            self._fraction = 1.0
            # Within a training the validator's settings still name the base model.
            what = "best.pt" if validator.args.mode == "train" else Path(str(validator.args.model)).name
            message = f"measuring {what} on {validator.args.split}"
            self._report(phase="evaluate", epoch=self.epochs_done, message=message)

    on_val_batch_end = _check_stop


def _group(values: dict[str, float], prefix: str) -> dict[str, float]:
    return {key[len(prefix) :]: float(value) for key, value in values.items() if key.startswith(prefix)}
