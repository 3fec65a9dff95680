"""A YOLO11 model as an ONNX file, and that as a TensorRT engine; both for all shapes and batch sizes.

The ONNX file serves OpenVINO too: its own converter takes four times as long for the same network.
Call `ultralytics_env.isolate` first: this module imports Ultralytics.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils.export.engine import onnx2engine, torch2onnx

from rvmcv_worker.compute.backends import INPUT

#: The newest that ONNX Runtime and TensorRT have all operators of.
_OPSET = 17
#: Most images that a TensorRT engine takes at once, and for which it is made fastest.
_ENGINE_BATCH = 16


def write_onnx(model: nn.Module, target: Path) -> None:
    """Write the network in fp32, with heights, widths and the batch left open."""
    network: Any = copy.deepcopy(model).float().cpu().eval()
    network = network.fuse(verbose=False)
    for parameter in network.parameters():
        parameter.requires_grad = False
    head = network.model[-1]
    head.export, head.dynamic, head.format = True, True, "onnx"
    outputs = {"output0": {0: "batch", 2: "anchors"}}
    if type(head).__name__ == "Segment":
        outputs["output1"] = {0: "batch", 2: "mask_height", 3: "mask_width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that makes shapes dynamic is the one it calls old
        torch2onnx(
            network,
            torch.zeros(1, 3, 320, 256),  # not square, so that no height is taken for a width
            target,
            opset=_OPSET,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic={INPUT: {0: "batch", 2: "height", 3: "width"}, **outputs},
        )


def write_engine(
    onnx: Path, target: Path, *, precision: str, imgsz: int, names: list[str], task: str
) -> None:
    """Build a TensorRT engine for the GPU that is here; takes minutes. Not tried on a GPU."""
    onnx2engine(
        str(onnx),
        target,
        quantize=16 if precision == "fp16" else None,
        dynamic=True,
        shape=(_ENGINE_BATCH, 3, imgsz, imgsz),
        metadata={
            "names": dict(enumerate(names)),
            "task": task,
            "stride": 32,
            "imgsz": [imgsz, imgsz],
            "batch": _ENGINE_BATCH,
            "channels": 3,
            "dynamic": True,
        },
    )
