"""A child whose GPU memory runs out: run in place of `rvmcv_worker.compute.child`, as text.

Raises torch's error where a GPU would, in Ultralytics; what is tested stays untouched. The job's seed says
where, and what is more than fits.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from rvmcv_worker.compute import ultralytics_env, yolo11_train
from rvmcv_worker.compute.child import Child, main

FIRST_EPOCH, LATER_EPOCH, OPTIMIZER_STEP, VALIDATION, FINAL_EVALUATION, LARGE_IMAGES, ALWAYS = range(1, 8)


def _run_out() -> NoReturn:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB (a test)")


def _install(place: int) -> None:
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator

    train_batch, step = DetectionTrainer.preprocess_batch, BaseTrainer.optimizer_step
    val_batch = DetectionValidator.preprocess

    def preprocess_batch(trainer: Any, batch: Any) -> Any:
        in_epoch = place == FIRST_EPOCH or (place == LATER_EPOCH and trainer.epoch >= 1)
        too_large = place == LARGE_IMAGES and trainer.args.imgsz > 96
        if (in_epoch and trainer.batch_size > 2) or too_large or place == ALWAYS:
            _run_out()
        return train_batch(trainer, batch)

    def optimizer_step(trainer: Any) -> None:
        if place == OPTIMIZER_STEP and trainer.epoch >= 1 and trainer.batch_size > 4:
            _run_out()
        step(trainer)

    def preprocess(validator: Any, batch: Any) -> Any:
        in_place = place == (VALIDATION if validator.training else FINAL_EVALUATION)
        if in_place and len(batch["img"]) > 8:
            _run_out()
        return val_batch(validator, batch)

    DetectionTrainer.preprocess_batch = preprocess_batch
    BaseTrainer.optimizer_step = optimizer_step
    DetectionValidator.preprocess = preprocess


def _run(job: dict[str, Any], child: Child) -> dict[str, Any]:
    ready, run = ultralytics_env.require_safe_load, _train

    def then_install() -> None:
        ready()  # Ultralytics is imported by then
        _install(job["options"]["seed"])

    ultralytics_env.require_safe_load = then_install
    return run(job, child)


if __name__ == "__main__":
    _train = yolo11_train.run
    yolo11_train.run = _run
    sys.exit(main())
