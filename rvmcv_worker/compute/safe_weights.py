"""`best.safetensors`: the weights of a `best.pt` alone, in a format that cannot run code.

Names, types and bytes of the tensors are those of the `best.pt`; what else that says is not in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from rvmcv_worker.errors import ModelInvalidError

FILE = "best.safetensors"
#: All that the file says beside the tensors: whose they are, which readers ask for.
_METADATA = {"format": "pt"}


def write(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors to `path`, whole or not at all; equal ones make equal bytes."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(_bytes(weights))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def require_same(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise `ModelInvalidError` unless the file at `path` is what `write` makes of `weights`, to the byte.

    So nothing is read of what a stranger may have put there: no header, and nothing that readers skip.
    """
    wanted = _bytes(weights)
    if path.stat().st_size != len(wanted) or path.read_bytes() != wanted:
        raise ModelInvalidError(
            f"{path.name} is not best.pt's weights in another format: it has other tensors, or says more"
        )


def _bytes(weights: Mapping[str, torch.Tensor]) -> bytes:
    # Each tensor by itself on the CPU: the format has neither views nor shared storage.
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in weights.items()}
    return save(plain, metadata=_METADATA)
