"""What a job runs on: precision, device, package versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import cv2
import numpy as np
import torch
import torchvision


def device(name: str) -> torch.device:
    """Return the device that a job names: ``cpu`` or the index of a GPU."""
    return torch.device("cpu" if name == "cpu" else f"cuda:{name}")


def precision(device: torch.device) -> str:
    """Return what SAM2 trains in: ``bf16`` on a GPU that computes with it itself, else ``fp32``."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if bf16 else "fp32"


def be_deterministic(seed: int) -> None:
    """Let the same numbers come out of the same work, as far as there are kernels that can."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would fill each new tensor before it is written: that finds faults, and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)


def amp(wanted: bool | str, on_gpu: bool) -> bool | str:
    """Return Ultralytics' `amp`; never True, which makes it download a model to try it out."""
    return "bf16" if on_gpu and wanted not in (False, "fp32") and torch.cuda.is_bf16_supported() else False


def device_name(on_gpu: bool) -> str:
    """Return the GPU's name, or the number of threads on a CPU."""
    if on_gpu:
        return str(torch.cuda.get_device_name(0))
    return f"cpu, {torch.get_num_threads()} threads"


def versions(on_gpu: bool) -> dict[str, str | None]:
    """Return the versions that decide about a result; ``driver`` and ``cuda`` only on a GPU."""
    driver = None
    if on_gpu:
        import pynvml

        try:
            pynvml.nvmlInit()
            driver = str(pynvml.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError as error:
            driver = f"unknown ({error})"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "ultralytics": metadata.version("ultralytics-opencv-headless"),
        "sam2": metadata.version("sam2"),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": driver,
    }
