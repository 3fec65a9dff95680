"""What runs a detector's network: one session a backend, all with the same way in and out.

In go letterboxed images of one shape, out come the head's raw numbers; what is before and after that
(`detector.py`) is the same for all. Call `ultralytics_env.isolate` first: this module imports Ultralytics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from ultralytics.nn.autobackend import AutoBackend
from ultralytics.utils import NUM_THREADS

from rvmcv_worker.engine_wire import Backend
from rvmcv_worker.errors import UnsupportedJobError

#: An image as it goes into a session: height x width x 3, BGR, letterboxed.
Letterboxed = NDArray[np.uint8]


@dataclass(frozen=True)
class Raw:
    """What the head says of a batch of n images."""

    #: (n, 4 + classes + mask coefficients, anchors) float: boxes (centre and size), scores, …
    predictions: torch.Tensor
    #: (n, coefficients, height / 4, width / 4) float: the prototypes of a YOLO11-seg model's masks.
    prototypes: torch.Tensor | None


class Session(Protocol):
    """A network that is loaded and runs."""

    #: Whether several images may go through at once; a session that says no is given one at a time.
    batches: bool
    memory_bytes: int

    def run(self, images: Sequence[Letterboxed]) -> Raw:
        """Run images of one shape."""
        ...


class TorchSession:
    """PyTorch, fused and laid out as Ultralytics' predictor does it: on a CPU the numbers are the same."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str) -> None:
        self._network = AutoBackend(model, device=device, fp16=precision == "fp16", verbose=False)
        self._network.eval()
        self._device = device
        self.batches = device.type == "cuda"
        weights_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self.memory_bytes = 2 * weights_bytes

    @torch.inference_mode()
    def run(self, images: Sequence[Letterboxed]) -> Raw:
        """Run images of one shape."""
        batch = torch.from_numpy(np.stack(images)).to(self._device)
        batch = batch.permute(0, 3, 1, 2).contiguous().flip(1)  # BGR to RGB
        batch = (batch.half() if self._network.fp16 else batch.float()).div_(255)
        with _threads(NUM_THREADS if self._device.type == "cpu" else None):
            output = self._network(batch)[0]
        return Raw(*output) if isinstance(output, tuple) else Raw(output, None)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch compute with `count` threads for a while, for the number decides about the last bit.

    Ultralytics leaves one core free, for the whole process and for good; SAM2 beside it should have them all.
    """
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_session(backend: Backend, model: nn.Module, device: str) -> Session:
    """Return the session of `backend` for the PyTorch `model`, on the CPU ("cpu") or a GPU ("0", "1", …)."""
    if backend.name in ("torch-cpu", "torch-cuda"):
        return TorchSession(model, torch_device(device), backend.precision)
    raise UnsupportedJobError(f"this worker has no backend {backend.name!r}")


def torch_device(device: str) -> torch.device:
    """Return torch's name of "cpu", or of a GPU's number."""
    return torch.device("cpu" if device == "cpu" else f"cuda:{device}")
