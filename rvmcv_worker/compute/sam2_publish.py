"""The `best.pt` of a SAM2 training: `sam2.build_sam2` loads it as it is, and so does `open_sam2`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sam2.modeling.sam2_base import SAM2Base

from rvmcv_worker.compute import tensor_file
from rvmcv_worker.compute.sam2_metadata import Sam2Metadata


def write(path: Path, model: SAM2Base, metadata: Mapping[str, Any]) -> None:
    """Write all of `model` and what `Sam2Metadata` lists to `path`, whole or not at all.

    Equal weights and metadata make equal bytes. Raises pydantic's `ValidationError` for metadata of another
    kind.
    """
    content = {"model": _weights(model), **Sam2Metadata.model_validate(dict(metadata)).plain()}
    tensor_file.write(content, path, to_disk=True)


def _weights(model: SAM2Base) -> dict[str, torch.Tensor]:
    """Return every tensor of the model in fp32 on the CPU, each alone in its storage."""
    return {key: _alone(tensor.detach()) for key, tensor in model.state_dict().items()}


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose storage holds its own numbers and no others: torch saves whole storages."""
    plain = tensor.to("cpu", torch.float32).contiguous()
    own_bytes = plain.numel() * plain.element_size()
    return plain if plain.untyped_storage().nbytes() == own_bytes else plain.clone()
