"""YOLO11 checkpoints: opened with `weights_only`, told apart, and cleaned of the place they were made.

Call `ultralytics_env.isolate` first: this module imports Ultralytics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO, __version__
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.tasks import torch_safe_load, yaml_model_load

from rvmcv_worker.compute import pickle_scan
from rvmcv_worker.errors import JobError, ModelInvalidError

#: The layer that ends a model -> its label task.
_TASKS = {"Detect": "detect", "Segment": "segment"}


def open_yolo11(path: Path, label_task: str) -> YOLO:
    """Return the YOLO11 model at `path` for `label_task` (``detect``, ``segment``).

    Nothing in the file runs. Raises `ModelInvalidError` for anything else than such a model.
    """
    pickle_scan.refuse_dangerous(path)
    try:
        yolo = YOLO(str(path))
        architecture, task = identify(yolo.model, path.name)
    except JobError:
        raise
    except Exception as error:  # whatever a stranger's file makes the loader raise is a fault of the file
        raise ModelInvalidError(
            f"{path.name} does not load as an Ultralytics checkpoint: {_first_line(error)}; "
            "upload the best.pt of a YOLO11 training"
        ) from error
    if task != label_task:
        raise ModelInvalidError(
            f"{path.name} is a {task} model ({architecture}), but the job is for {label_task}; "
            f"use a {label_task} model as base, or make it a {task} job"
        )
    return yolo


def identify(model: torch.nn.Module, name: str) -> tuple[str, str]:
    """Return (architecture, label task), such as ``("yolo11n-seg", "segment")``.

    Compares layer by layer what was built and what the model's own YAML declares with YOLO11's, since a
    training builds from the second and loads from the first. Raises `ModelInvalidError` if it is not YOLO11.
    """
    declared: Any = getattr(model, "yaml", None)
    declared = declared if isinstance(declared, dict) else {}
    layers: Any = model.model
    built = [type(layer).__name__ for layer in layers]
    try:
        wires = _wires(declared)
    except (TypeError, KeyError, IndexError):
        wires = []
    # YOLO26 stacks the same layers; what tells it apart is its head's settings.
    other_head = declared.get("end2end") or declared.get("reg_max", 16) != 16
    same_body = (
        wires[:-1] == _wires(yaml_model_load("yolo11n.yaml"))[:-1] and [wire[2] for wire in wires] == built
    )
    task = _TASKS.get(built[-1]) if same_body and not other_head else None
    if task is None:
        known = declared.get("yaml_file") or type(model).__name__
        raise ModelInvalidError(
            f"{name} is not a YOLO11 detect or segment model (it is {Path(str(known)).name}); "
            "use a YOLO11 checkpoint, or yolo11n.yaml to start from scratch"
        )
    size = declared["scale"] if declared.get("scale") in ("n", "s", "m", "l", "x") else ""
    return f"yolo11{size}{'-seg' if task == 'segment' else ''}", task


def class_names(model: torch.nn.Module) -> list[str]:
    """Return the class names in order of their ids; raise `ModelInvalidError` if there are none."""
    names: Any = getattr(model, "names", None)
    if not isinstance(names, dict) or sorted(names) != list(range(len(names))):
        raise ModelInvalidError(f"the model has no class names, but {str(names)[:100]!r}")
    return [str(names[class_id]) for class_id in range(len(names))]


def clean(source: Path, target: Path, train_args: dict[str, Any]) -> None:
    """Write the checkpoint at `source` to `target` without anything about the place it was made.

    What stays: the weights (fp16), names, `train_args` (see `neutral`), metrics, the epochs' results.
    What goes: optimizer, paths, git, date and times; so equal trainings make equal files.
    """
    trained, _ = torch_safe_load(str(source))
    metrics = trained.get("train_metrics") or {}
    model = (trained.get("ema") or trained["model"]).half()
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.args = train_args
    model.criterion = None
    model.yaml = {key: Path(value).name if key == "yaml_file" else value for key, value in model.yaml.items()}
    model.__dict__.pop("pt_path", None)
    results = trained.get("train_results") or {}
    torch.save(
        {
            "epoch": -1,
            **dict.fromkeys(("best_fitness", "stopper", "ema", "updates", "optimizer", "scaler", "modelopt")),
            "model": model,
            "train_args": train_args,
            "train_metrics": {key: float(value) for key, value in metrics.items()},
            "train_results": {key: column for key, column in results.items() if key != "time"},
            "version": __version__,
            "license": "AGPL-3.0 (https://ultralytics.com/license)",
            "docs": "https://docs.ultralytics.com",
        },
        target,
    )


def neutral(args: dict[str, Any]) -> dict[str, Any]:
    """Return training settings in which paths are only names and project and name are not told."""
    kept = {key: value for key, value in args.items() if key in DEFAULT_CFG_DICT}
    kept.update(project=None, name=None)
    paths = {key for key, value in kept.items() if isinstance(value, str) and "/" in value}
    return {key: Path(value).name if key in paths else value for key, value in kept.items()}


def _wires(declared: dict[str, Any]) -> list[tuple[Any, int, str]]:
    """Return (from, repeats, layer) of each row of a model's YAML."""
    rows = [*declared["backbone"], *declared["head"]]
    return [(row[0], row[1], str(row[2]).rpartition(".")[2]) for row in rows]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
