"""YOLO11 checkpoints: opened with `weights_only`, told apart, and cleaned of the place they were made.

Call `ultralytics_env.isolate` first: this module imports Ultralytics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ultralytics import YOLO, __version__
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.tasks import torch_safe_load, yaml_model_load

from rvmcv_worker.compute import pickle_scan, telltale
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.errors import JobError, ModelInvalidError

#: Entries of a checkpoint that only a training that goes on needs.
_RESUMED_FROM = ("best_fitness", "stopper", "ema", "updates", "optimizer", "scaler", "modelopt")

#: All entries of a `best.pt` as `clean` writes it.
_PUBLISHED = frozenset(
    {
        *("epoch", *_RESUMED_FROM, "model", "train_args", "train_metrics", "train_results"),
        *("version", "license", "docs"),
    }
)

#: What Ultralytics writes of itself into a checkpoint.
_OF_ULTRALYTICS = {
    "version": __version__,
    "license": "AGPL-3.0 (https://ultralytics.com/license)",
    "docs": "https://docs.ultralytics.com",
}
#: What the daemon calls the data set of every training.
_DATA_FILE = "data.yaml"
#: The files of Ultralytics that a model is built by.
_ARCHITECTURES = frozenset(f"yolo11{size}{task}.yaml" for size in ("", *"nsmlx") for task in ("", "-seg"))

#: The layer that ends a model -> its label task.
_TASKS = {"Detect": "detect", "Segment": "segment"}


def open_yolo11(path: Path, label_task: str) -> YOLO:
    """Return the YOLO11 model at `path` for `label_task` (``detect``, ``segment``).

    Nothing in the file runs. Raises `ModelInvalidError` for anything else than such a model.
    """
    yolo, architecture, task = open_yolo11_of_any_task(path)
    if task != label_task:
        raise ModelInvalidError(
            f"{path.name} is a {task} model ({architecture}), but the job is for {label_task}; "
            f"use a {label_task} model as base, or make it a {task} job"
        )
    return yolo


def open_yolo11_of_any_task(path: Path) -> tuple[YOLO, str, str]:
    """Return the YOLO11 model at `path`, its architecture and its label task; as safe as `open_yolo11`."""
    pickle_scan.refuse_dangerous(path)
    try:
        yolo = YOLO(str(path))
        architecture, task = identify(yolo.model, path.name)
    except JobError:
        raise
    except Exception as error:  # whatever a stranger's file makes the loader raise is a fault of the file
        if _is_sam2(path):
            raise ModelInvalidError(
                f"{path.name} is a SAM2 checkpoint: it makes masks and finds nothing by itself; "
                "name it as segmenter, and a YOLO11 model as model"
            ) from error
        raise ModelInvalidError(
            f"{path.name} does not load as an Ultralytics checkpoint: {_first_line(error)}; "
            "upload the best.pt of a YOLO11 training"
        ) from error
    return yolo, architecture, task


def _is_sam2(path: Path) -> bool:
    try:
        weights = torch.load(path, map_location="meta", weights_only=True)["model"]
        return isinstance(weights, dict) and any(str(name).startswith("image_encoder.") for name in weights)
    except Exception:  # noqa: BLE001 - it is not: whatever it is, the loader has said so
        return False


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
    results = trained.get("train_results") or {}
    torch.save(
        {
            "epoch": -1,
            **dict.fromkeys(_RESUMED_FROM),
            "model": _model_without_place(trained, train_args),
            **_about(trained, train_args),
            "train_results": {key: column for key, column in results.items() if key != "time"},
        },
        target,
    )


def clean_to_resume(source: Path, target: Path, train_args: dict[str, Any]) -> None:
    """Write the `last.pt` at `source` to `target` as `clean` does, with all that it takes to go on."""
    trained, _ = torch_safe_load(str(source))
    torch.save(
        {
            "epoch": int(trained["epoch"]),
            **{key: _plain(trained.get(key)) for key in _RESUMED_FROM},
            "model": None,
            "ema": _model_without_place(trained, train_args),
            **_about(trained, train_args),
            "train_results": trained.get("train_results") or {},
        },
        target,
    )


def weights(source: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the checkpoint at `source`, of the types that it has them in."""
    trained, _ = torch_safe_load(str(source))
    return dict(trained["model"].state_dict())


def refuse_telltale(source: Path) -> None:
    """Raise `ModelInvalidError` if `source` says more than `clean` writes, or names this machine or user."""
    trained, _ = torch_safe_load(str(source))
    train_args = trained.get("train_args") or {}
    if strange := sorted((trained.keys() - _PUBLISHED) | (train_args.keys() - DEFAULT_CFG_DICT.keys())):
        raise ModelInvalidError(
            f"{source.name} has {printable(str(strange[0]))!r}: no training of ours writes that"
        )
    model = trained["model"]
    of_model = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    about = [{**trained, "model": None, "train_args": None}, {**of_model, "args": None}]
    settings = [
        {**args, "model": None} for args in (train_args, of_model.get("args")) if isinstance(args, dict)
    ]
    # A machine or its user may be called "yolo11n", "docs" or "ultralytics" as well.
    own_words = {
        *telltale.values([DEFAULT_CFG_DICT, _OF_ULTRALYTICS, _DATA_FILE]),
        *telltale.values([yaml_model_load("yolo11n.yaml"), yaml_model_load("yolo11n-seg.yaml")]),
        *_ARCHITECTURES,
    }
    telltale.refuse_place(source.name, [*about, *settings], {*class_names(model), *own_words})


def left_off_at(source: Path) -> tuple[int, dict[str, Any]]:
    """Return after how many epochs the `last.pt` at `source` was saved, and with which settings.

    The epochs are 0 for one without an optimizer: nothing can go on from it.
    """
    trained, _ = torch_safe_load(str(source))
    epochs = int(trained["epoch"]) + 1 if trained.get("optimizer") is not None else 0
    return epochs, dict(trained["train_args"])


def _model_without_place(trained: dict[str, Any], train_args: dict[str, Any]) -> torch.nn.Module:
    model: Any = (trained.get("ema") or trained["model"]).half()
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.args = train_args
    model.criterion = None
    model.yaml = {key: Path(value).name if key == "yaml_file" else value for key, value in model.yaml.items()}
    model.__dict__.pop("pt_path", None)
    return cast("torch.nn.Module", model)


def _about(trained: dict[str, Any], train_args: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_args": train_args,
        "train_metrics": {key: float(value) for key, value in (trained.get("train_metrics") or {}).items()},
        **_OF_ULTRALYTICS,
    }


def _plain(value: Any) -> Any:
    """Return numbers of NumPy as Python's own; tensors stay."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


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
