"""`best.safetensors`: the weights of a `best.pt` alone, in a format that cannot run code.

Names, types and bytes of the tensors are those of the `best.pt`; what else that says is not in it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch

from rvmcv_worker.errors import ModelInvalidError

FILE = "best.safetensors"
#: All that the file says beside the tensors: of which library's they are, which readers ask for.
_METADATA = {"format": "pt"}


def write(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors to `path`, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(safetensors_torch.save(_plain(weights), metadata=_METADATA))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def require_same(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise `ModelInvalidError` unless the file at `path` holds `weights`, bit for bit, and nothing else."""
    try:
        # Readers skip what they do not know in the header: here it is read whole.
        with path.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(header_bytes, path.stat().st_size)))
        with safe_open(path, framework="pt") as file:
            # The library refuses holes, overlaps and anything after the last tensor.
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError, ValueError, struct.error, RecursionError) as error:
        raise ModelInvalidError(f"{path.name} is no safetensors file: {error}") from None
    if header.pop("__metadata__", None) != _METADATA or any(
        set(about) != {"dtype", "shape", "data_offsets"} for about in header.values()
    ):
        raise ModelInvalidError(
            f"{path.name} says more than its tensors: it may hold {_METADATA} beside them"
        )
    wanted = _plain(weights)
    if wrong := sorted(name for name in wanted.keys() | found.keys() if not _equal(name, wanted, found)):
        raise ModelInvalidError(
            f"{path.name} is not best.pt in another format: {len(wrong)} tensors differ, {wrong[0]} first"
        )


def _plain(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each tensor by itself on the CPU: the format has neither views nor shared storage."""
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in weights.items()}


def _equal(name: str, wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> bool:
    """Compare bytes, so that one NaN equals another and -0 is not 0."""
    if name not in wanted or name not in found:
        return False
    one, other = wanted[name], found[name]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
