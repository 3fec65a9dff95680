"""`sam2`: fine-tune SAM 2.1 on masks, prove whether that helped, deliver it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rvmcv_worker import checkpoints, workspace
from rvmcv_worker.jobs import sam2_config, sam2_sizes, training, training_delivery
from rvmcv_worker.jobs.sam2_config import Sam2Config
from rvmcv_worker.ledger import ClaimState
from rvmcv_worker.sam2_options import SCRATCH

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt

KIND = training_delivery.Kind(
    model_name="sam2",
    label_task="segment",
    artifacts=("results.csv", "curves.png", "masks.jpg", "args.yaml"),
    check={"model_type": "sam2"},
    metrics=("miou", "fitness", "base", "improved", "verdict"),
)


class Sam2(training.Training):
    """The job type."""

    name = "sam2"

    def parse(self, config: Mapping[str, Any]) -> Sam2Config:
        """Return the validated config; raises `InvalidJobError`."""
        return sam2_config.parse(config)

    def gpus(self, _config: Mapping[str, Any]) -> int:
        """Return 1: a config that asks for more is claimed at once, and refused by `parse`."""
        return 1

    def train(self, attempt: Attempt, config: Sam2Config) -> dict[str, Any]:
        """Fetch, check, train, publish; the base model first, since its size may forbid all of it."""
        with attempt.phase("download"):
            model, size_bytes = _base_model(attempt, config)
            resume = attempt.fetch_checkpoint()
            training.fetch_data_set(attempt, config)
            active = training.fetch_active_model(attempt, config)
        data = training.prepare(
            attempt, config, job_type=self.name, label_task=KIND.label_task, seed=config.options.seed
        )
        attempt.enter(ClaimState.RUNNING)
        with attempt.phase("train"):
            job = {
                "task": "train_sam2",
                "attempt": attempt.claim.attempt,
                "model": model,
                "model_name": config.base_model,
                "architecture": config.scratch_architecture,
                "names": data["names"],
                "data": "prepare/data",
                "options": config.options.model_dump(mode="json"),
                "active_model": active,
                "device": training.device_of(attempt),
                "time_limit_h": config.time_limit_h,
                "resume": resume,
                "safetensors": config.safetensors,
                "cache_bytes": _cache_bytes(attempt, size_bytes),
                "memory_limit_bytes": int(attempt.services.settings.limits.max_job_memory_gb * 1e9),
            }
            trained = attempt.run_child(
                checkpoints.CHILD,
                job,
                readable=("prepare",),
                timeout_s=attempt.services.settings.limits.max_job_h * 3600,
            ).result
        return training_delivery.deliver(attempt, config, KIND, trained, data)


def _base_model(attempt: Attempt, config: Sam2Config) -> tuple[str, int]:
    """Return what the train child starts from, and the size in bytes of the model that comes out.

    That is the base model's: what comes out is whole and in fp32, as Meta's are. One that would be too large
    is refused before it is fetched where its name says so, else right after.
    """
    named = config.scratch_architecture or config.base_model.removesuffix(".pt")
    size_bytes = sam2_sizes.MODEL_BYTES.get(named, 0)
    _refuse(attempt, config, size_bytes)
    if config.from_scratch:
        return SCRATCH, size_bytes
    model = training.fetch_base_model(attempt, config)
    size_bytes = max(size_bytes, (attempt.workspace.root / model).stat().st_size)
    _refuse(attempt, config, size_bytes)
    return model, size_bytes


def _refuse(attempt: Attempt, config: Sam2Config, size_bytes: int) -> None:
    """Raise for a model that nobody would take, and for one that there is no room to train."""
    sam2_sizes.refuse_too_large(attempt, config, size_bytes)
    limits = attempt.services.settings.limits
    sam2_sizes.refuse_without_room(attempt.workspace.root, limits, config.options.train, size_bytes)


def _cache_bytes(attempt: Attempt, size_bytes: int) -> int:
    services, directory = attempt.services, attempt.workspace.root
    held_bytes = max(services.work_usage.read().bytes, workspace.measure(directory).bytes)
    return sam2_sizes.cache_bytes(directory, services.settings.limits, held_bytes, size_bytes)
