"""What runs a detector's network: one session a backend, all with the same way in and out.

In go letterboxed images of one shape, out come the head's raw numbers; what is before and after that
(`detector.py`) is the same for all. Call `ultralytics_env.isolate` first: this module imports Ultralytics.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
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


#: What the image is called in an ONNX file.
INPUT = "images"
_OPENVINO_PRECISION = {"bf16": "bf16", "fp32": "f32"}


@dataclass(frozen=True)
class Raw:
    """What the head says of a batch of n images."""

    #: (n, 4 + classes + mask coefficients, anchors) float: boxes (centre and size), scores, …
    predictions: torch.Tensor
    #: (n, coefficients, height / 4, width / 4) float: the prototypes of a YOLO11-seg model's masks.
    prototypes: torch.Tensor | None = None


class Session(Protocol):
    """A network that is loaded and runs."""

    #: Whether several images may go through at once; a session that says no is given one at a time.
    batches: bool
    #: With how many threads torch is to compute what comes after; None leaves it as it is.
    threads: int | None

    def run(self, images: Sequence[Letterboxed]) -> Raw:
        """Run images of one shape."""
        ...


class TorchSession:
    """PyTorch, fused and laid out as Ultralytics' predictor does it: on a CPU the numbers are the same.

    Or TensorRT, which Ultralytics runs with tensors of torch. Not tried on a GPU.
    """

    def __init__(self, model: nn.Module | Path, device: torch.device, precision: str) -> None:
        self._network = AutoBackend(model, device=device, fp16=precision == "fp16", verbose=False)
        self._network.eval()
        self._device = device
        self.batches = device.type == "cuda"
        self.threads = NUM_THREADS if device.type == "cpu" else None

    @torch.inference_mode()
    def run(self, images: Sequence[Letterboxed]) -> Raw:
        """Run images of one shape."""
        batch = torch.from_numpy(np.stack(images)).to(self._device)
        batch = batch.permute(0, 3, 1, 2).contiguous().flip(1)  # BGR to RGB
        batch = (batch.half() if self._network.fp16 else batch.float()).div_(255)
        with torch_threads(self.threads):
            output = self._network(batch)
        if self._network.format == "pt":
            output = output[0]  # beside it are the head's numbers before they are decoded
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        return Raw(*(part.float() for part in outputs))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
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


class OpenVinoSession:
    """OpenVINO on a CPU, from an ONNX file.

    The network is compiled once, for all shapes: a new one costs its first image some 20 ms, where a network
    compiled for it costs 170 and then gains 2. Pixels go in as they are, the rest is compiled in.
    """

    batches = False
    threads: int | None = 1  # more would get in the way of the runtime's own, waiting for work as they spin

    def __init__(self, export: Path, precision: str) -> None:
        openvino = import_openvino()
        core = openvino.Core()
        steps = openvino.preprocess.PrePostProcessor(core.read_model(export))
        steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
        steps.input().tensor().set_color_format(openvino.preprocess.ColorFormat.BGR)
        steps.input().preprocess().convert_color(openvino.preprocess.ColorFormat.RGB)
        steps.input().preprocess().convert_element_type(openvino.Type.f32).scale(255.0)
        steps.input().model().set_layout(openvino.Layout("NCHW"))
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _OPENVINO_PRECISION[precision]}
        self._request = core.compile_model(steps.build(), "CPU", hints).create_infer_request()

    def run(self, images: Sequence[Letterboxed]) -> Raw:
        """Run images of one shape; what it returns is overwritten by the next call."""
        output = self._request.infer([np.stack(images)], share_inputs=True, share_outputs=True)
        return Raw(*(torch.from_numpy(output[number]) for number in range(len(output))))


class OnnxRuntimeSession:
    """ONNX Runtime on a CPU."""

    batches = False
    threads: int | None = 1  # more would get in the way of the runtime's own, waiting for work as they spin

    def __init__(self, export: Path) -> None:
        onnxruntime = _import("onnxruntime")
        options = onnxruntime.SessionOptions()
        # Else its threads spin on for a while after each image, and take the cores from who tells its result.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(export, options, providers=["CPUExecutionProvider"])

    def run(self, images: Sequence[Letterboxed]) -> Raw:
        """Run images of one shape."""
        batch = cv2.dnn.blobFromImages(images, 1 / 255, swapRB=True)
        return Raw(*(torch.from_numpy(output) for output in self._session.run(None, {INPUT: batch})))


def open_session(backend: Backend, model: nn.Module, device: str) -> Session:
    """Return the session of `backend` for the PyTorch `model`, on the CPU ("cpu") or a GPU ("0", "1", …)."""
    if backend.name in ("torch-cpu", "torch-cuda"):
        return TorchSession(model, torch_device(device), backend.precision)
    export = Path(backend.path or "")
    if backend.name == "openvino":
        return OpenVinoSession(export, backend.precision)
    if backend.name == "onnxruntime":
        return OnnxRuntimeSession(export)
    if backend.name == "tensorrt":
        _import("tensorrt")
        return TorchSession(export, torch_device(device), backend.precision)
    raise UnsupportedJobError(f"this worker has no backend {backend.name!r}")


def torch_device(device: str) -> torch.device:
    """Return torch's name of "cpu", or of a GPU's number."""
    return torch.device("cpu" if device == "cpu" else f"cuda:{device}")


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which tells Google Analytics of the import itself.

    Raises `UnsupportedJobError` where it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # cannot be imported
    return _import("openvino")


def openvino_has_bf16() -> bool:
    """Whether the CPU computes in bf16; OpenVINO would silently take fp32 elsewhere."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedJobError(f"{name} is not installed here: {error}") from error
