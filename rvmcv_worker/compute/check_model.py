"""Is this checkpoint what it should be? Asked in a fresh child before a model is published.

Whoever receives the file may open it without protection, so the bar is higher than for loading: only the
types that a training of ours writes, and no trace of the machine it was made on.
"""

from __future__ import annotations

from typing import Any

from rvmcv_worker.compute import file_hash, pickle_scan, ultralytics_env
from rvmcv_worker.compute.child import Child
from rvmcv_worker.errors import ModelInvalidError

#: Edge of the picture that proves that the model computes, in pixels.
_TRIAL_PX = 64


def run(job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Return facts about ``job["model"]``; raise `ModelInvalidError` for the first that is not right.

    ``origin``: ``trained`` (default: by us, to be published) or ``base`` (fetched: other types and paths may
    occur). ``label_task``, and ``expect`` ``{"task", "names"}``, where given, must hold.
    """
    path = child.root / job["model"]
    expect = {"task": job.get("label_task"), "names": None, **(job.get("expect") or {})}

    # What the pickle names, before anything is loaded.
    pickle_scan.refuse_dangerous(path)
    found = pickle_scan.scan(path)
    if job.get("origin", "trained") == "trained":
        if found.not_ours:
            raise ModelInvalidError(
                f"{path.name} names {', '.join(found.not_ours[:5])}: no YOLO11 training writes that"
            )
        if found.local_paths:
            raise ModelInvalidError(
                f"{path.name} holds paths of the machine it was made on: {found.local_paths[0]!r}"
            )
    child.check_stop()

    # Loaded with weights_only; what it is, against what it should be.
    ultralytics_env.isolate(child.directory)
    from rvmcv_worker.compute import checkpoint

    ultralytics_env.require_safe_load()
    yolo = checkpoint.open_yolo11(path, expect["task"])
    architecture, task = checkpoint.identify(yolo.model, path.name)
    names = checkpoint.class_names(yolo.model)
    if expect["names"] is not None and names != list(expect["names"]):
        raise ModelInvalidError(f"{path.name} has the classes {names}, not {list(expect['names'])}")
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
        "ok_types": True,
        "task": task,
        "names": names,
        "architecture": architecture,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "size_bytes": path.stat().st_size,
        "sha256": file_hash.sha256(path),
    }
