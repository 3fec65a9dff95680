"""Trains YOLO11 as plain ``YOLO(…).train(…)`` does, and makes what it leaves fit to be published.

Same settings and seed give the same weights as without this module: it listens to Ultralytics, and
never draws a random number of its own. Read `run` from top to bottom.
"""

from __future__ import annotations

import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvmcv_worker.compute import (
    checkpoint_file,
    pickle_scan,
    ranks,
    training_faults,
    training_files,
    ultralytics_env,
)
from rvmcv_worker.compute.checkpoint_file import State
from rvmcv_worker.compute.child import Child, StopRequestedError
from rvmcv_worker.compute.training_figures import figures
from rvmcv_worker.compute.training_progress import TrainingProgress
from rvmcv_worker.errors import InvalidJobError, ModelInvalidError

if TYPE_CHECKING:
    from rvmcv_worker.compute.training_checkpoint import LeftOff

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
_MEASURING = ("conf", "iou", "max_det", "single_cls", "agnostic_nms", "augment")


def run(job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Train, or go on where `job["resume"]` left off; measure and clean.

    Returns ``{"model", "metrics", "files", "effective", "versions", "epochs", "attempts", "ended_by"}``;
    `ended_by` is ``epochs``, ``patience`` or ``time_limit``. Raises `ModelInvalidError`, `InvalidJobError`,
    `DatasetInvalidError`, `OutOfGpuMemoryError`, …; what a training raises has
    ``detail = {"files", "epochs", "batch", "imgsz"}``.
    """
    _refuse_base_model(job, child)  # what is wrong with one is mostly seen without loading anything

    # Ultralytics before torch: it sets how many threads torch will start with.
    ultralytics_env.isolate(child.directory / (f"rank{child.rank}" if child.rank else ""))
    from rvmcv_worker.compute import runtime
    from rvmcv_worker.compute.training_checkpoint import TrainingCheckpoints

    ultralytics_env.require_safe_load()

    on_gpu, several = job["device"] != "cpu", job.get("ranks", 1) > 1
    output = child.directory / "run"
    settings, args = _settings(job, child, output)
    time_limit_h = job["options"].get("time") or job.get("time_limit_h")

    # Where it begins: where an earlier child left off, else with the base model.
    left_off = _left_off(job, child, output, args)
    earlier = left_off.state if left_off else State()
    if left_off:
        settings |= {"batch": left_off.batch, "imgsz": left_off.imgsz}
        settings["resume"] = str(output / "weights" / "last.pt")
    yolo = _open(job, child, settings)
    progress = TrainingProgress(child, args.epochs, time_limit_h, earlier)
    progress.attach(yolo)
    kept = TrainingCheckpoints(child, output, progress, earlier, attempt=job.get("attempt", 1))
    if not child.rank:
        yolo.add_callback("on_fit_epoch_end", kept.on_fit_epoch_end)  # after that of progress
    if child.rank is None:
        progress.begin("reading the labels")

    # The training, unless an earlier child came to its end; then what it is worth.
    try:
        metrics = None
        if child.rank is not None:
            from rvmcv_worker.compute import rank_trainer

            yolo.train(trainer=rank_trainer.of_task(job["label_task"]), **settings)
            if child.rank == 0:
                training_faults.refuse_diverged(yolo.trainer)
            return {"state": asdict(kept.state)}
        if earlier.ended_by is None and several:
            rank_job = {**job, "left_off": asdict(left_off) if left_off else None}
            kept.state = State.parse(ranks.launch(job["ranks"], child, rank_job)["state"])
            progress = TrainingProgress(child, args.epochs, time_limit_h, kept.state)
        elif earlier.ended_by is None:
            metrics = yolo.train(**settings)
            training_faults.refuse_diverged(yolo.trainer)
        measured, effective = _measure(job, child, args, settings, progress, metrics)
    except StopRequestedError:
        kept.keep_newest()
        raise
    except Exception as error:
        # A fault leaves what it had drawn by then, and a checkpoint to go on from.
        kept.keep_newest()
        reached = {
            "batch": progress.batch_size or settings.get("batch", args.batch),
            "imgsz": settings.get("imgsz", args.imgsz),
        }
        fault = training_faults.explain(error, **reached, started=progress.started, root=child.root)
        reached = {"epochs": progress.epochs_done, **reached, **(fault.detail or {})}  # a rank knows more
        files = [] if child.rank else training_files.gather(output, child.directory)
        fault.detail = {**reached, "files": files}
        raise fault from error

    return {
        "model": "best.pt",
        "metrics": measured,
        "files": training_files.gather(output, child.directory),
        "effective": {
            **effective,
            "amp": str(settings["amp"]) if settings["amp"] else False,
            "device_name": runtime.device_name(on_gpu),
            "time_limit_h": time_limit_h,
        },
        "versions": runtime.versions(on_gpu),
        "epochs": progress.epochs_done,
        "attempts": kept.state.attempts(),
        "ended_by": progress.ended_by(progress.epochs_done),
    }


def _settings(job: dict[str, Any], child: Child, output: Path) -> tuple[dict[str, Any], Any]:
    """Return what Ultralytics is called with, and all its settings by that; raises `InvalidJobError`."""
    from ultralytics.cfg import get_cfg

    from rvmcv_worker.compute import runtime

    on_gpu = job["device"] != "cpu"
    options = {key: value for key, value in job["options"].items() if key != "time"}
    # Ours come last, so that no option can move the output or skip the validation.
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
        **({"rect": False} if job.get("ranks", 1) > 1 else {}),
    }
    try:
        return settings, get_cfg(overrides=settings)
    except (SyntaxError, TypeError, ValueError) as error:
        raise InvalidJobError(f"the training's options do not hold: {error}") from None


def _measure(
    job: dict[str, Any],
    child: Child,
    args: Any,
    settings: dict[str, Any],
    progress: TrainingProgress,
    metrics: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the trained model fit to be published; returns what it is worth, and the effective settings.

    `metrics` is what the training has measured on val, None where it had ended in an earlier child.
    """
    from ultralytics.utils import YAML
    from ultralytics.utils.plotting import plot_results

    from rvmcv_worker.compute import checkpoint, safe_weights

    # best.pt and args.yaml are written anew without local paths; no best while every fitness is NaN.
    output = child.directory / settings["name"]
    best, last = output / "weights" / "best.pt", output / "weights" / "last.pt"
    _, trained_with = checkpoint.left_off_at(last)
    train_args = checkpoint.neutral({**trained_with, "model": job.get("model_name", job["model"])})
    checkpoint.clean(best if best.exists() else last, child.directory / "best.pt", train_args)
    YAML.save(child.directory / "args.yaml", train_args)
    if job.get("safetensors"):
        safe_weights.write(
            child.directory / safe_weights.FILE, checkpoint.weights(child.directory / "best.pt")
        )

    cleaned = checkpoint.open_yolo11(child.directory / "best.pt", job["label_task"])
    progress.attach(cleaned)
    names = checkpoint.class_names(cleaned.model)
    effective = {key: train_args[key] for key in _EFFECTIVE if key in train_args}
    effective["architecture"], _ = checkpoint.identify(cleaned.model, "the trained model")

    # On val (a training has just measured it), beside the active model, on test.
    measuring = {
        "data": settings["data"],
        "imgsz": train_args["imgsz"],
        "batch": train_args["batch"] * 2,  # as a training does: batches decide about the padding
        **{key: getattr(args, key) for key in _MEASURING},
        "quantize": 16 if settings["amp"] else None,
        "device": job["device"].split(",")[0],
        "workers": args.workers,
        "exist_ok": True,
        "verbose": False,
    }
    if metrics is None:
        metrics = cleaned.val(
            split="val", project=str(child.directory), name=output.name, plots=True, **measuring
        )
        plot_results(output / "results.csv")
    measuring.update(project=str(output), plots=False)
    measured = {
        **figures(metrics, names),
        "test": None,
        "active": _active(job, child, progress, names, measuring),
    }
    if YAML.load(settings["data"]).get("test"):
        measured["test"] = figures(cleaned.val(split="test", name="test", **measuring), names)
    return measured, effective


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


def _open(job: dict[str, Any], child: Child, settings: dict[str, Any]) -> Any:
    """Open what the training goes on from, or its base model."""
    from ultralytics import YOLO

    from rvmcv_worker.compute import checkpoint

    if "resume" in settings:
        return YOLO(settings["resume"])
    if job["model"] in FROM_SCRATCH[job["label_task"]]:
        return YOLO(job["model"], task=job["label_task"])
    return checkpoint.open_yolo11(child.root / job["model"], job["label_task"])


def _left_off(job: dict[str, Any], child: Child, output: Path, args: Any) -> LeftOff | None:
    """Return where `job["resume"]` left off; None to start from the beginning: a bad one ends no job.

    Of several ranks the process that launches them has looked, and says in `job["left_off"]`.
    """
    from ultralytics.utils import LOGGER, YAML

    from rvmcv_worker.compute import training_checkpoint

    if child.rank is not None:
        found = job["left_off"]
        if not found:
            return None
        return training_checkpoint.LeftOff(**{**found, "state": State.parse(found["state"])})
    training_files.clear(output, child.directory)
    if job.get("resume"):
        names = ["item"] if args.single_cls else list(YAML.load(args.data)["names"].values())
        path = child.root / job["resume"]
        try:
            return training_checkpoint.restore(path, output, job["label_task"], args, names)
        except Exception as error:  # noqa: BLE001  whatever a stranger's file makes the loader raise
            said = training_faults.without_root(str(error), child.root)
            LOGGER.warning(f"The checkpoint cannot be used, the training starts from the beginning: {said}")
            training_files.clear(output, child.directory)
    checkpoint_file.discard(child.directory)
    return None


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
    except Exception as error:  # told in the report, with its traceback in the log
        if training_faults.is_out_of_gpu_memory(error) and measuring["batch"] > 2:
            raise  # a smaller batch may do
        traceback.print_exc()
        return {"error": training_faults.without_root(f"{type(error).__name__}: {error}", child.root)}
