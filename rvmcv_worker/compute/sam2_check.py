"""What a SAM2 checkpoint is, asked before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base

from rvmcv_worker.compute import safe_weights, sam2_checkpoint, sam2_metadata, telltale
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.segmenter import Segmenter
from rvmcv_worker.errors import ModelInvalidError

#: Edge of the square that proves that the model computes, in pixels.
_TRIAL_PX = 64
#: What a file has beside the numbers of its tensors and its metadata, at most: names, shapes, padding.
_BESIDE_BYTES = 1024 * 1024


def facts(path: Path, job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Return what the model is; raise `ModelInvalidError` unless it is what `job` expects, and computes.

    One that we trained (``origin``) also has to have our metadata, and nothing beside.
    """
    expect = job.get("expect") or {}
    model, checkpoint = sam2_checkpoint.open_sam2(path, image_px=_TRIAL_PX)
    _require("architecture", checkpoint.architecture, expect.get("architecture"), path.name)
    parameters = sum(tensor.numel() for tensor in checkpoint.weights.values())
    about: dict[str, Any] = {}
    if job.get("origin", "trained") == "trained":
        metadata = sam2_metadata.parse(checkpoint.metadata, path.name)
        _require("classes", metadata.classes, expect.get("names"), path.name)
        most_bytes = 4 * parameters + sam2_metadata.MAX_BYTES + _BESIDE_BYTES
        if path.stat().st_size > most_bytes:
            raise ModelInvalidError(
                f"{path.name} has {path.stat().st_size} bytes, but its tensors need {4 * parameters}: "
                "save tensors that are not views of larger ones, and nothing else"
            )
        # The base model's name is RVM-Server's word, the classes are the data set's; others are our own, and
        # a machine may be called "box".
        said = {**metadata.plain(), "base_model": None, "config": None, "trained": None}
        telltale.refuse_place(path.name, said, {*metadata.classes, str(metadata.metrics.get("verdict"))})
        about = {"names": metadata.classes, "image_px": metadata.image_px}
    if job.get("safetensors"):
        safe_weights.require_same(child.root / job["safetensors"], checkpoint.weights)
    child.check_stop()

    _try_out(model, path.name)
    return {"task": "segment", "architecture": checkpoint.architecture, "parameters": parameters, **about}


def _require(what: str, found: object, expected: object, name: str) -> None:
    if expected is not None and found != expected:
        raise ModelInvalidError(f"{name} has the {what} {found}, not {expected}")


def _try_out(model: SAM2Base, name: str) -> None:
    """Segment one box of a small picture, as an inference does."""
    rows, columns = np.indices((_TRIAL_PX, _TRIAL_PX), np.uint8)
    picture = np.stack([4 * rows, 4 * columns, rows ^ columns], axis=-1)
    box = np.array([[1, 1, 3, 3]], np.float32) * (_TRIAL_PX / 4)
    segmenter = Segmenter(model, "", device=torch.device("cpu"), cache=None)
    try:
        finite = all(
            bool(torch.isfinite(mask).all()) for mask in segmenter.logits(picture, box, image_key="")
        )
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ModelInvalidError(f"{name} fails on a picture of {_TRIAL_PX} px: {error}") from error
    if not finite:
        raise ModelInvalidError(f"{name} computes numbers that are not finite; its training diverged")
