"""What a YOLO11 checkpoint is, asked before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rvmcv_worker.compute import ultralytics_env
from rvmcv_worker.compute.child import Child
from rvmcv_worker.errors import ModelInvalidError

#: Edge of the picture that proves that the model computes, in pixels.
_TRIAL_PX = 64


def facts(path: Path, job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Return what the model is; raise `ModelInvalidError` unless it is what `job` expects, and computes."""
    expect = {"task": job.get("label_task"), "names": None, **(job.get("expect") or {})}

    # Loaded with weights_only; what it is, against what it should be.
    ultralytics_env.isolate(child.directory)
    from rvmcv_worker.compute import checkpoint

    ultralytics_env.require_safe_load()
    yolo = checkpoint.open_yolo11(path, expect["task"])
    architecture, task = checkpoint.identify(yolo.model, path.name)
    names = checkpoint.class_names(yolo.model)
    if expect["names"] is not None and names != list(expect["names"]):
        raise ModelInvalidError(f"{path.name} has the classes {names}, not {list(expect['names'])}")
    if job.get("origin", "trained") == "trained":
        checkpoint.refuse_telltale(path)
    if job.get("safetensors"):
        from rvmcv_worker.compute import safe_weights

        safe_weights.require_same(child.root / job["safetensors"], checkpoint.weights(path))
    child.check_stop()

    # One picture through it.
    import torch

    model = yolo.model.float().eval()
    try:
        with torch.inference_mode():
            output = model(torch.zeros(1, 3, _TRIAL_PX, _TRIAL_PX))
        boxes = output[0][0] if isinstance(output[0], tuple) else output[0]
        finite = bool(torch.isfinite(boxes).all())
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ModelInvalidError(f"{path.name} fails on a picture of {_TRIAL_PX} px: {error}") from error
    if not finite:
        raise ModelInvalidError(f"{path.name} computes numbers that are not finite; its training diverged")

    return {
        "task": task,
        "names": names,
        "architecture": architecture,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
