"""What a SAM2 training delivers: its figures, on all splits and beside other models, and its files."""

from __future__ import annotations

import contextlib
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from rvmcv_worker.compute import (
    runtime,
    safe_weights,
    sam2_checkpoint,
    sam2_curves,
    sam2_kept,
    sam2_publish,
    sam2_score,
    training_faults,
)
from rvmcv_worker.compute.child import StopRequestedError
from rvmcv_worker.compute.sam2_base_model import BaseModel
from rvmcv_worker.compute.sam2_kept import Course
from rvmcv_worker.compute.sam2_network import Network

if TYPE_CHECKING:
    from rvmcv_worker.compute.sam2_training import Training

#: Every name that a training may leave in its directory to be published.
PUBLISHED_FILES = ("best.pt", "best.safetensors", "results.csv", "args.yaml", "curves.png", "masks.jpg")


def empty(directory: Path) -> Path:
    """Remove what an earlier child of the same job left, and return the folder for what a training saves."""
    output = directory / "run"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    for path in (*map(directory.joinpath, PUBLISHED_FILES), *directory.glob("*.f16")):
        path.unlink(missing_ok=True)
    return output


def files(directory: Path) -> list[str]:
    """Return the names of what can be published."""
    return [name for name in PUBLISHED_FILES if (directory / name).is_file()]


def metrics(training: Training, course: Course, before: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what was measured, and what is measured now: on test, beside base; the active model on val."""
    assert course.best is not None  # every training has an epoch
    report = sam2_score.report(course.best, course.base, course.box_as_mask, course.best_epoch)
    training.progress.say(report["verdict"])
    report.update(test=None, active=None)
    if "test" in training.samples:
        report["test"] = _or_error(training, partial(_on_test, training, before))
    if training.job.get("active_model"):
        report["active"] = _or_error(training, partial(_active_on_val, training))
    return report


def _on_test(training: Training, before: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the best epoch's figures on test, with those of the base under ``base``."""
    network, progress = training.network, training.progress
    test = training.proof("test", None)
    progress.evaluate("the best epoch on test")
    found = test.measure(network).to_dict()
    progress.evaluate("the base model on test")
    trained = sam2_kept.copy(network)
    try:
        sam2_kept.load(network, before)
        training.base.serve(network)
        return {**found, "base": test.measure(network).to_dict()}
    finally:
        sam2_kept.load(network, trained)


def _active_on_val(training: Training) -> dict[str, Any]:
    """Return the active model's figures on val, at the size that it is served at."""
    training.progress.evaluate("the active model on val")
    active = BaseModel.read(training.child.root / training.job["active_model"], image_px=None)
    network = Network(active.model, "decoder", training.network.device)
    active.serve(network)
    return training.proof("val", None).measure(network).to_dict()


def _or_error(training: Training, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `measure` returns, or ``{"error"}``: the model is good whatever fails beside it."""
    try:
        return measure()
    except StopRequestedError:
        raise
    except Exception as error:  # noqa: BLE001  told in the report, with its traceback in the log
        traceback.print_exc()
        fault = training_faults.explain(
            error, batch=1, imgsz=training.options.imgsz, started=True, root=training.child.root
        )
        return {"error": fault.message}


def published(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that stand in the model: not those of another model, and no errors.

    An error's text may name a place on this machine, and a model that does is not published.
    """
    return {
        key: None if isinstance(value, dict) and "error" in value else value
        for key, value in metrics.items()
        if key != "active"
    }


def effective(training: Training, caches: dict[str, Any]) -> dict[str, Any]:
    """Return all options in force, and what else decides about a result or its time."""
    network, device = training.network, training.network.device
    trained = sum(parameter.numel() for parameter in network.trained_parameters().values())
    return {
        "model": training.base.name,
        "architecture": training.base.architecture,
        **training.options.model_dump(),
        "lr0": training.lr0,
        "time_limit_h": training.job.get("time_limit_h"),
        "device": training.job["device"],
        "device_name": runtime.device_name(device.type == "cuda"),
        "precision": runtime.precision(device),
        "samples": {split: samples.describe() for split, samples in training.samples.items()},
        "caches": caches,
        "images_at_once": training.memory.images_at_once,
        "objects_at_once": training.memory.objects_at_once,
        "parameters_trained": trained,
        "parameters": sum(parameter.numel() for parameter in network.model.parameters()),
    }


def write(
    training: Training,
    course: Course,
    metrics: dict[str, Any],
    effective: dict[str, Any],
    versions: dict[str, str | None],
) -> None:
    """Write what is delivered beside the sheet; the model first, which is worth more than all else."""
    directory, options, base = training.child.directory, training.options, training.base
    metadata = {
        "config": base.architecture,
        "base_model": base.name,
        "base_sha256": base.sha256,
        "image_px": options.imgsz,
        "trained": options.train,
        "classes": training.job["names"],
        "metrics": published(metrics),
        "versions": versions,
        "multimask_fallback": options.box_share < 1,
        "epochs": course.best_epoch,
    }
    best = directory / "best.pt"
    sam2_publish.write(best, training.network.model, metadata)
    if training.job.get("safetensors"):
        with beside_the_model():
            safe_weights.write(directory / safe_weights.FILE, sam2_checkpoint.read(best).weights)
    with beside_the_model():
        args = yaml.safe_dump(effective, sort_keys=False, allow_unicode=True)
        (directory / "args.yaml").write_text(args, encoding="utf-8")
    draw_curves(directory, course.history)


def draw_curves(directory: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write the table and the picture of all epochs."""
    with beside_the_model():
        sam2_curves.curves(history, directory / "results.csv", directory / "curves.png")


@contextlib.contextmanager
def beside_the_model() -> Iterator[None]:
    """Tell in the log what goes wrong within: no training is lost over what there is to look at."""
    try:
        yield
    except StopRequestedError:
        raise
    except Exception:  # noqa: BLE001
        traceback.print_exc()
