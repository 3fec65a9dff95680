"""How large a fine-tuned SAM2 becomes, who would not take it, and what room is left for its training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rvmcv_worker.errors import UnsupportedJobError, WorkerUnfitError
from rvmcv_worker.sam2_options import ARCHITECTURES, Trained

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt
    from rvmcv_worker.config import LimitSettings
    from rvmcv_worker.jobs.sam2_config import Sam2Config

_GB = 1e9
_MB = 1024**2
#: Bytes of a whole checkpoint of each of SAM 2.1's sizes in fp32, as a training writes it, rounded up.
MODEL_BYTES = dict(zip(ARCHITECTURES, (156_100_000, 184_500_000, 323_700_000, 898_200_000), strict=True))
#: Largest file that `upload-model` takes.
UPLOAD_BYTES = 200 * _MB
#: What a training keeps beside its data and embeddings at most, in sizes of the model: the base model, the
#: active one, best.pt, frozen, and as the check child sees it; the rest is for checkpoints, which hold what
#: is trained, an eighth of the model at most.
_BESIDE = 6
#: The same where all is trained, and a checkpoint has four times the size of the model. There are that which
#: it goes on from, what the newest is made of, two with one being written, and one on its way to storage.
_BESIDE_ALL = 5 + 4 * 6


def refuse_too_large(attempt: Attempt, config: Sam2Config, size_bytes: int) -> None:
    """Raise `UnsupportedJobError` where nobody would take the model; better now than after hours."""
    limit_mb = attempt.services.settings.limits.max_model_mb
    what = f"{config.scratch_architecture or config.base_model} makes a best.pt of {size_bytes / _MB:.0f} MB"
    if size_bytes > limit_mb * _MB:
        raise UnsupportedJobError(
            f"{what}, over this worker's limit of {limit_mb:g} MB: train a smaller one of SAM 2.1's four "
            f"({', '.join(ARCHITECTURES)}), or raise [limits] max_model_mb"
        )
    storage = attempt.services.storage
    # `can_store` asks RVM-Server; only where the answer is known to be no is there no way.
    if size_bytes > UPLOAD_BYTES and not storage.can_store and storage.lacking:
        raise UnsupportedJobError(
            f"{what}, over the {UPLOAD_BYTES // _MB} MB that upload-model takes, and this worker has no "
            "storage: train sam2.1_hiera_tiny or _small, or set [storage] s3_endpoint and put s3-access-key "
            "and s3-secret-key beside the token"
        )


def refuse_without_room(directory: Path, limits: LimitSettings, trained: Trained, size_bytes: int) -> None:
    """Raise where the training of a model of `size_bytes` would end for want of disk, before it begins.

    That is `UnsupportedJobError` for the limit, `WorkerUnfitError` for what the disk of `directory` has now.
    """
    needed_bytes = size_bytes * (_BESIDE_ALL if trained == "all" else _BESIDE)
    what = (
        f"train {trained!r} of a model of {size_bytes / _MB:.0f} MB takes up to {needed_bytes / _GB:.1f} GB "
        "of disk beside its data"
    )
    if needed_bytes > limits.max_workspace_gb * _GB:
        raise UnsupportedJobError(
            f"{what}, over this worker's limit of {limits.max_workspace_gb:g} GB: train 'decoder' or "
            "'decoder+neck', or a smaller model, or raise [limits] max_workspace_gb"
        )
    free_bytes = _free_bytes(directory, limits)
    if needed_bytes > free_bytes:
        raise WorkerUnfitError(
            f"{what}, and the worker's disk has {max(0.0, free_bytes / _GB):.1f} GB above "
            "[limits] disk_floor_gb: it goes back to the queue"
        )


def cache_bytes(directory: Path, limits: LimitSettings, held_bytes: int, size_bytes: int) -> int:
    """Return what embeddings may take of the disk of `directory`, where all workspaces hold `held_bytes`.

    With all else that the training of a model of `size_bytes` writes, so much that the worker still claims
    for its other lanes (`workspace_high_water`), and at most half of what is free above the floor: the other
    half is for whoever writes beside.
    """
    allowed_bytes = limits.workspace_high_water * limits.max_workspace_gb * _GB - held_bytes
    return max(0, int(min(allowed_bytes, _free_bytes(directory, limits) / 2)) - _BESIDE * size_bytes)


def _free_bytes(directory: Path, limits: LimitSettings) -> float:
    """Return what the disk has above its floor."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize - limits.disk_floor_gb * _GB
