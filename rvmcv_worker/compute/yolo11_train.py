"""Trains YOLO11 as plain ``YOLO(…).train(…)`` does, and makes what it leaves fit to be published.

Same settings and seed give the same weights as without this module: it listens to Ultralytics, and
never draws a random number of its own. Read `run` from top to bottom.
"""

from __future__ import annotations

import traceback
from typing import Any

from rvmcv_worker.compute import pickle_scan, training_faults, training_files, ultralytics_env
from rvmcv_worker.compute.child import Child, StopRequestedError
from rvmcv_worker.compute.training_figures import figures
from rvmcv_worker.compute.training_progress import TrainingProgress
from rvmcv_worker.errors import InvalidJobError, ModelInvalidError

#: Architectures that may be trained from scratch: label task -> names.
FROM_SCRATCH = {
    "detect": tuple(f"yolo11{size}.yaml" for size in "nsmlx"),
    "segment": tuple(f"yolo11{size}-seg.yaml" for size in "nsmlx"),
}

#: Settings whose effective values a report tells.
_EFFECTIVE = (
    *("model", "pretrained", "epochs", "imgsz", "batch", "patience", "workers", "device", "seed"),
    *("deterministic", "optimizer", "lr0", "lrf", "momentum", "weight_decay", "warmup_epochs"),
    *("warmup_momentum", "warmup_bias_lr", "cos_lr", "close_mosaic", "cache", "freeze", "fraction"),
    *("single_cls", "rect", "multi_scale", "dropout", "nbs", "box", "cls", "dfl", "hsv_h", "hsv_s", "hsv_v"),
    *("degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "bgr", "mosaic", "mixup"),
    *("cutmix", "copy_paste", "copy_paste_mode", "max_det"),
)

#: Settings in which `measuring` follows the training's own validation.
_MEASURING = ("imgsz", "conf", "iou", "max_det", "single_cls", "agnostic_nms", "augment", "quantize")


def run(job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Train, measure and clean.

    Returns ``{"model", "metrics", "files", "effective", "versions", "epochs", "ended_by"}``; `ended_by` is
    ``epochs``, ``patience`` or ``time_limit``. Raises `ModelInvalidError`, `DatasetInvalidError`,
    `InvalidJobError`, `OutOfGpuMemoryError`, …; what a training raises has ``detail = {"files", "epochs"}``.
    """
    _refuse_base_model(job, child)  # what is wrong with one is mostly seen without loading anything

    # Ultralytics before torch: it sets how many threads torch will start with.
    ultralytics_env.isolate(child.directory)
    from ultralytics import YOLO
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import YAML

    from rvmcv_worker.compute import checkpoint, runtime

    ultralytics_env.require_safe_load()
    if job["model"] in FROM_SCRATCH[job["label_task"]]:
        yolo = YOLO(job["model"], task=job["label_task"])
    else:
        yolo = checkpoint.open_yolo11(child.root / job["model"], job["label_task"])

    # The settings. Ours come last, so that no option can move the output or skip the validation.
    options = dict(job["options"])
    time_limit_h = options.pop("time", None) or job.get("time_limit_h")
    on_gpu = job["device"] != "cpu"
    output = child.directory / "run"
    settings = {
        **options,
        "data": str(child.root / job["data"]),
        "device": job["device"],
        "project": str(child.directory),
        "name": output.name,
        "exist_ok": True,
        "val": True,
        "save": True,
        "plots": True,
        "amp": runtime.amp(options.get("amp", True), on_gpu),
        **({} if on_gpu else {"workers": 0}),
    }
    try:
        args = get_cfg(overrides=settings)
    except (SyntaxError, TypeError, ValueError) as error:
        raise InvalidJobError(f"the training's options do not hold: {error}") from None

    # The training. A fault leaves what it had drawn by then; `last.pt` stays under run/weights.
    progress = TrainingProgress(child, args.epochs, time_limit_h)
    progress.attach(yolo)
    child.report(phase="train", fraction=0.0, epoch=0, epochs=args.epochs, message="reading the labels")
    try:
        metrics = yolo.train(**settings)
        training_faults.refuse_diverged(yolo.trainer)
    except StopRequestedError:
        raise
    except Exception as error:
        fault = training_faults.explain(error, args, progress.started, child.root)
        fault.detail = {
            "files": training_files.gather(output, child.directory),
            "epochs": progress.epochs_done,
        }
        raise fault from error
    trainer = yolo.trainer

    # What is published: best.pt and args.yaml written anew without local paths, the rest moved.
    train_args = checkpoint.neutral({**vars(trainer.args), "model": job.get("model_name", job["model"])})
    best = trainer.best if trainer.best.exists() else trainer.last  # no best while every fitness is NaN
    checkpoint.clean(best, child.directory / "best.pt", train_args)
    YAML.save(child.directory / "args.yaml", train_args)

    # What best.pt is worth: on val (Ultralytics has just measured it), on test, beside the active model.
    names = list(trainer.data["names"].values())
    measuring = {
        "data": settings["data"],
        "batch": trainer.batch_size * 2,  # as a training does: batches decide about the padding
        **{key: getattr(trainer.validator.args, key) for key in _MEASURING},
        "device": job["device"],
        "workers": trainer.args.workers,
        "project": str(output),
        "exist_ok": True,
        "plots": False,
        "verbose": False,
    }
    measured = {
        **figures(metrics, names),
        "test": None,
        "active": _active(job, child, progress, names, measuring),
    }
    if trainer.data.get("test"):
        cleaned = checkpoint.open_yolo11(child.directory / "best.pt", job["label_task"])
        progress.attach(cleaned)
        measured["test"] = figures(cleaned.val(split="test", name="test", **measuring), names)

    return {
        "model": "best.pt",
        "metrics": measured,
        "files": training_files.gather(output, child.directory),
        "effective": {
            **{key: train_args[key] for key in _EFFECTIVE if key in train_args},
            "architecture": checkpoint.identify(trainer.model, "the trained model")[0],
            "amp": str(trainer.args.amp) if trainer.amp else False,
            "device_name": runtime.device_name(trainer.device),
            "time_limit_h": time_limit_h,
        },
        "versions": runtime.versions(on_gpu),
        "epochs": progress.epochs_done,
        "ended_by": progress.ended_by,
    }


def _refuse_base_model(job: dict[str, Any], child: Child) -> None:
    """Raise `ModelInvalidError` unless the model is a name from our list or a harmless checkpoint."""
    known = FROM_SCRATCH[job["label_task"]]
    if job["model"] in known:
        return
    if job["model"].endswith((".yaml", ".yml")):
        raise ModelInvalidError(
            f"{job['model']} is no architecture for {job['label_task']}; known are {', '.join(known)}"
        )
    pickle_scan.refuse_dangerous(child.root / job["model"])


def _active(
    job: dict[str, Any], child: Child, progress: TrainingProgress, names: list[str], measuring: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the active model's figures on the same val split, ``{"error"}``, or None without one.

    The training is good whatever is wrong with the active model: nothing here may cost it.
    """
    from rvmcv_worker.compute import checkpoint

    if not job.get("active_model"):
        return None
    try:
        active = checkpoint.open_yolo11(child.root / job["active_model"], job["label_task"])
        if (classes := checkpoint.class_names(active.model)) != names:
            return {"error": f"not comparable: the active model's classes are {classes}, not {names}"}
        progress.attach(active)
        return figures(active.val(split="val", name="active", **measuring), names)
    except StopRequestedError:
        raise
    except ModelInvalidError as error:
        return {"error": error.message}
    except Exception as error:  # noqa: BLE001  told in the report, with its traceback in the log
        traceback.print_exc()
        return {"error": training_faults.without_root(f"{type(error).__name__}: {error}", child.root)}
