"""SAM2 checkpoints with random weights: there are no others that a test could rely on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from rvmcv_worker.compute import sam2_checkpoint

#: What a training of ours says beside the weights.
METADATA: dict[str, Any] = {
    "config": "sam2.1_hiera_tiny",
    "base_model": "sam2-base-1",
    "base_sha256": "ab" * 32,
    "image_px": 128,
    "trained": "decoder",
    "classes": ["bottle", "can"],
    "metrics": {"miou": 0.5, "per_class": {"bottle": {"miou": 0.5}, "can": {"miou": None}}},
    "versions": {"torch": "2.15.0", "cuda": None},
    "multimask_fallback": False,
    "epochs": 3,
}


@functools.cache
def weights(architecture: str = "sam2.1_hiera_tiny", seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a state dict, the same for the same seed; callers change a copy."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(sam2_checkpoint.build(architecture).state_dict())


def hollow(
    architecture: str = "sam2.1_hiera_tiny", dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return a state dict of zeros that share one number's storage: a file of it has 100 kB, not 156 MB."""
    zero = torch.zeros((), dtype=dtype)
    return {key: zero.expand(tensor.shape) for key, tensor in weights(architecture).items()}


def save(path: Path, content: object | None = None, **metadata: Any) -> Path:
    """Write a checkpoint of the seeded weights, or whatever `content` is."""
    torch.save({"model": weights(), **metadata} if content is None else content, path)
    return path
