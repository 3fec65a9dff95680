"""`yolo11`: train a YOLO11 detector or segmenter, prove what it is worth, deliver it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rvmcv_worker import checkpoints
from rvmcv_worker.errors import OutOfGpuMemoryError
from rvmcv_worker.events import Event, event
from rvmcv_worker.jobs import training, training_config, training_delivery, yolo11_config
from rvmcv_worker.jobs.memory_ladder import Rung, smallest_imgsz
from rvmcv_worker.jobs.yolo11_config import Yolo11Config
from rvmcv_worker.ledger import ClaimState

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt

#: What a training may leave to be published beside `best.pt`, by exact name: a child names nothing.
ARTIFACTS = (
    "results.csv",
    "args.yaml",
    "results.png",
    "labels.jpg",
    "confusion_matrix.png",
    "confusion_matrix_normalized.png",
    *(f"{kind}{curve}_curve.png" for kind in ("Box", "Mask") for curve in ("P", "R", "F1", "PR")),
    *(f"train_batch{index}.jpg" for index in range(6)),
    *(f"val_batch{index}_{kind}.jpg" for index in range(3) for kind in ("labels", "pred")),
)


class Yolo11(training.Training):
    """The job type."""

    name = "yolo11"

    def parse(self, config: Mapping[str, Any]) -> Yolo11Config:
        """Return the validated config; raises `InvalidJobError`."""
        return yolo11_config.parse(config)

    def gpus(self, config: Mapping[str, Any]) -> int:
        """Return how many GPUs the training asks for."""
        return training_config.gpus_wanted(config)

    def train(self, attempt: Attempt, config: Yolo11Config) -> dict[str, Any]:
        """Fetch, check, train, publish."""
        with attempt.phase("download"):
            resume = attempt.fetch_checkpoint()
            training.fetch_data_set(attempt, config)
            model = config.base_model if config.from_scratch else training.fetch_base_model(attempt, config)
            active = training.fetch_active_model(attempt, config)
        data = training.prepare(
            attempt, config, job_type=self.name, label_task=config.label_task, seed=config.options.seed
        )
        attempt.enter(ClaimState.RUNNING)
        with attempt.phase("train"):
            job = {
                "task": "train_yolo11",
                "attempt": attempt.claim.attempt,
                "model": model,
                "model_name": config.base_model,
                "label_task": config.label_task,
                "data": "prepare/data.yaml",
                "options": config.options.model_dump(mode="json", exclude_none=True),
                "active_model": active,
                "device": training.device_of(attempt),
                "ranks": max(1, len(attempt.gpus)),
                "time_limit_h": config.time_limit_h,
                "resume": resume,
                "safetensors": config.safetensors,
            }
            trained = _train_as_memory_allows(attempt, config, job)
        kind = training_delivery.Kind(self.name, config.label_task, ARTIFACTS, check={})
        return training_delivery.deliver(attempt, config, kind, trained, data)


def _train_as_memory_allows(attempt: Attempt, config: Yolo11Config, job: dict[str, Any]) -> dict[str, Any]:
    """Run the train child; each time the GPU's memory is too small a fresh one goes on with less."""
    until_s = time.monotonic() + attempt.services.settings.limits.max_job_h * 3600
    asked_imgsz = config.options.imgsz
    smallest = smallest_imgsz(asked_imgsz, may_shrink=config.allow_smaller_img_size)
    rung = Rung(config.options.batch, asked_imgsz)
    while True:
        options = {**job["options"], "batch": rung.batch, "imgsz": rung.imgsz}
        try:
            return attempt.run_child(
                checkpoints.CHILD,
                {**job, "options": options},
                readable=("prepare",),
                timeout_s=max(0.0, until_s - time.monotonic()),
            ).result
        except OutOfGpuMemoryError as error:
            lower = rung.reached(error.detail).below(smallest, smallest_batch=job["ranks"])
            if lower is None:
                raise
            said = f"out of GPU memory: going on with batch {lower.batch} at {lower.imgsz} px"
            event(Event.JOB_MEMORY_SHORT, attempt.offer.job_id).warning(
                "{} ({}); nothing to do, a smaller batch in the job spares the tries", said, error.message
            )
            attempt.progress.update(batch_size=lower.batch, message=said)
            rung = lower
            # What an earlier attempt left is where this one began; its own is newer.
            job = {**job, "resume": checkpoints.newest_file(attempt.workspace) or job["resume"]}
