"""A model as a SAM2 training finds it: the one that it begins with, or the one that it is measured beside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sam2.modeling.sam2_base import SAM2Base

from rvmcv_worker.compute import file_hash, sam2_checkpoint, sam2_metadata
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.errors import ModelInvalidError
from rvmcv_worker.sam2_options import SCRATCH, Sam2Options


@dataclass(frozen=True)
class BaseModel:
    """A model before it is trained."""

    model: SAM2Base
    #: One of `sam2_checkpoint.CONFIGS`.
    architecture: str
    #: As people know it.
    name: str
    #: Of its file; None for random weights.
    sha256: str | None
    #: As its file wants it to be served.
    multimask_fallback: bool

    @classmethod
    def open(cls, job: dict[str, Any], root: Path, options: Sam2Options) -> BaseModel:
        """Return what `job["model"]` names, for images of `options.imgsz`; raises `ModelInvalidError`."""
        if job["model"] != SCRATCH:
            return cls.read(root / job["model"], image_px=options.imgsz, name=job.get("model_name"))
        architecture = job.get("architecture")
        if architecture not in sam2_checkpoint.CONFIGS:
            known = ", ".join(sam2_checkpoint.CONFIGS)
            raise ModelInvalidError(f"{architecture} is no architecture of SAM 2.1; known are {known}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = sam2_checkpoint.build(architecture, image_px=options.imgsz)
        return cls(model, architecture, SCRATCH, None, multimask_fallback=True)

    @classmethod
    def read(cls, path: Path, *, image_px: int | None, name: str | None = None) -> BaseModel:
        """Return the model at `path`; without `image_px` for images of the size that it is served at."""
        model, found = sam2_checkpoint.open_sam2(path, image_px=image_px)
        served = sam2_metadata.served(found.metadata, path.name)
        sha256 = file_hash.sha256(path)
        return cls(model, found.architecture, name or path.name, sha256, served.multimask_fallback)

    def serve(self, network: Network) -> None:
        """Let `network`, which has this model, answer as it is served."""
        network.model.sam_mask_decoder.dynamic_multimask_via_stability = self.multimask_fallback
