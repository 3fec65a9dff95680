"""Fine-tunes SAM2 on images, and proves on val whether that helped. Read `run` from top to bottom."""

from __future__ import annotations

import contextlib
import shutil
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from rvmcv_worker.compute import (
    checkpoint_file,
    instances,
    runtime,
    sam2_batches,
    sam2_curves,
    sam2_kept,
    sam2_optimizer,
    sam2_publish,
    sam2_score,
    training_faults,
    ultralytics_env,
)
from rvmcv_worker.compute.checkpoint_file import Run, State
from rvmcv_worker.compute.child import Child, StopRequestedError
from rvmcv_worker.compute.sam2_base_model import BaseModel
from rvmcv_worker.compute.sam2_embeddings import EmbeddingsFile, Key
from rvmcv_worker.compute.sam2_kept import Course, LeftOff, Sam2Checkpoints
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.compute.sam2_progress import Sam2Progress
from rvmcv_worker.compute.sam2_proof import Proof
from rvmcv_worker.compute.sam2_samples import Samples
from rvmcv_worker.compute.sam2_sheet import Sheet
from rvmcv_worker.compute.sam2_step import Step
from rvmcv_worker.sam2_options import Sam2Options

#: Every name that a training may leave in its directory to be published.
PUBLISHED_FILES = ("best.pt", "results.csv", "args.yaml", "curves.png", "masks.jpg")

#: Learning rate where the job names none. With pretrained weights a decoder alone takes ten times what Meta's
#: recipe gives the whole model.
_LR0 = {"decoder": 5e-5, "decoder+neck": 5e-5, "all": 5e-6}
_LR0_SCRATCH = 1e-3


@dataclass(frozen=True)
class _Training:
    """What is there from before the first step until after the last."""

    job: dict[str, Any]
    child: Child
    options: Sam2Options
    #: As options say, or by what is trained.
    lr0: float
    base: BaseModel
    network: Network
    memory: Memory
    progress: Sam2Progress
    #: By split: train, val, and test if there is one.
    samples: dict[str, Samples]

    def encoded(self, split: str, wanted: list[Key], limit_bytes: int) -> EmbeddingsFile:
        """Return the frozen output of a split, as much of it as `limit_bytes` hold encoded now."""
        embeddings = EmbeddingsFile(
            self.samples[split],
            self.network,
            self.memory,
            self.options,
            wanted,
            path=self.child.directory / f"{split}.f16",
            limit_bytes=limit_bytes,
        )
        self.progress.encode(split)
        embeddings.fill(self.progress.encoded, self.child.check_stop)
        self.progress.say(embeddings.sentence())
        return embeddings

    def proof(self, split: str, embeddings: EmbeddingsFile | None) -> Proof:
        """Return the split to be measured; without `embeddings` each image is encoded each time."""
        names, tick = self.job["names"], self.progress.tick
        return Proof(self.samples[split], embeddings, names, self.memory, self.child.check_stop, tick)


def run(job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Train, or go on where `job["resume"]` left off; measure and write what is delivered.

    Returns ``{"model", "metrics", "files", "effective", "versions", "epochs", "attempts", "ended_by"}``;
    `ended_by` is ``epochs``, ``patience`` or ``time_limit``. Raises `ModelInvalidError`, `InvalidJobError`,
    `DatasetInvalidError`, `OutOfGpuMemoryError`, …, with
    ``detail = {"files", "epochs", "batch", "imgsz", "objects"}``.
    """
    ultralytics_env.isolate_others(child.directory)
    options = Sam2Options.model_validate(job["options"])
    names, device = job["names"], runtime.device(job["device"])
    runtime.be_deterministic(options.seed)
    output = _empty(child)

    with contextlib.ExitStack() as stack:
        reached = stack.enter_context(_faults(child, options))

        # The model before the first step, and where an earlier child left off.
        base = BaseModel.open(job, child.root, options)
        network = Network(base.model, options.train, device)
        lr0 = options.lr0 or (_LR0[options.train] if base.sha256 else _LR0_SCRATCH)
        optimizer = sam2_optimizer.optimizer(network, options, lr0)
        setup = sam2_kept.setup(network, train=options.train, imgsz=options.imgsz, classes=names)
        left_off = _left_off(job, child, output, network, optimizer, setup)
        earlier = left_off.state if left_off else State()
        progress = Sam2Progress(child, options.epochs, job.get("time_limit_h"), earlier)
        this_run = Run(job.get("attempt", 1), epochs=0, batch_size=options.batch, img_size=options.imgsz)
        kept = Sam2Checkpoints(child, output, progress, earlier, network, optimizer, setup, this_run)
        reached.kept = kept
        progress.begin("reading the labels")
        memory, samples = Memory(options, device, progress.say), _samples(job, options, child)
        training = _Training(job, child, options, lr0, base, network, memory, progress, samples)

        # What that model is worth, and the box itself in the place of a mask.
        wanted = sam2_batches.wanted_upright(samples["val"])
        val = stack.enter_context(training.encoded("val", wanted, job["cache_bytes"]))
        proof, sheet = training.proof("val", val), Sheet(samples["val"], names)
        progress.measure("the base model")
        base.serve(network)
        sheet.before(proof, network)
        course = left_off.course if left_off else Course(proof.measure(network), proof.box_as_mask())
        before = sam2_kept.copy(network) if "test" in samples else {}

        # The training, unless an earlier child came to its end.
        network.model.sam_mask_decoder.dynamic_multimask_via_stability = options.box_share < 1
        if left_off:
            left_off.apply(network, optimizer)
        ended_by, caches = earlier.ended_by, {"val": val.describe()}
        if ended_by is None:
            epochs = range(earlier.epochs, options.epochs)
            wanted = sam2_batches.wanted_in_training(samples["train"], options, epochs)
            left_bytes = job["cache_bytes"] - val.kept_bytes
            train = stack.enter_context(training.encoded("train", wanted, left_bytes))
            caches["train"] = train.describe()
            step = Step(network, optimizer, options, memory, child.check_stop)
            progress.start()
        while ended_by is None:
            losses, lr = _epoch(training, train, step)
            score = proof.measure(network)
            ended_by = _ended_by(training, course, score)
            entry = progress.finish_epoch(losses, score, course.beside, lr=lr, is_last=ended_by is not None)
            course = course.after(entry, score)
            kept.after_epoch(course, ended_by=ended_by)

        # What the best epoch is worth, and all that is delivered.
        sam2_kept.load_best(network, output)
        progress.evaluate("the best epoch")
        sheet.after(proof, network)
        sheet.write(child.directory / "masks.jpg")
        metrics = _metrics(training, course, proof, before)
        effective = _effective(training, caches)
        versions = runtime.versions(device.type == "cuda")
        _write(training, course, metrics, effective, versions)
        return {
            "model": "best.pt",
            "metrics": metrics,
            "files": _files(child),
            "effective": effective,
            "versions": versions,
            "epochs": progress.epochs_done,
            "attempts": kept.state.attempts(),
            "ended_by": ended_by,
        }


@dataclass
class _Reached:
    """How far a training is, for when it fails."""

    kept: Sam2Checkpoints | None = None


@contextlib.contextmanager
def _faults(child: Child, options: Sam2Options) -> Iterator[_Reached]:
    """Make a job's error of what is raised within, with what there is to publish; keep a checkpoint."""
    reached = _Reached()
    try:
        yield reached
    except StopRequestedError:
        if reached.kept:
            reached.kept.keep_newest()
        raise
    except Exception as error:
        fault = training_faults.explain(
            error, batch=options.batch, imgsz=options.imgsz, started=True, root=child.root
        )
        epochs = 0
        if reached.kept:
            reached.kept.keep_newest()
            epochs = reached.kept.state.epochs
            with contextlib.suppress(OSError):  # the disk may be full, and the fault is the one to tell
                _draw_curves(child, reached.kept.history)
        (child.directory / "best.pt").unlink(missing_ok=True)
        fault.detail = {
            "epochs": epochs,
            "batch": options.batch,
            "imgsz": options.imgsz,
            "objects": options.objects,
            **(fault.detail or {}),
            "files": _files(child),
        }
        raise fault from error


def _empty(child: Child) -> Path:
    """Remove what an earlier child of the same job left, and return the folder for what a training saves."""
    output = child.directory / "run"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    for name in PUBLISHED_FILES:
        (child.directory / name).unlink(missing_ok=True)
    return output


def _files(child: Child) -> list[str]:
    return [name for name in PUBLISHED_FILES if (child.directory / name).is_file()]


def _samples(job: dict[str, Any], options: Sam2Options, child: Child) -> dict[str, Samples]:
    """Return the splits, each without what nothing can be learned from."""
    data, check_stop = child.root / job["data"], child.check_stop
    found = {}
    for split in ("train", "val", "test"):
        file = data / "instances" / f"{split}.jsonl"
        if split != "test" or file.is_file():
            images = instances.read(file)
            found[split] = Samples(data, images, options.imgsz, split=split, check_stop=check_stop)
    return found


def _left_off(
    job: dict[str, Any],
    child: Child,
    output: Path,
    network: Network,
    optimizer: torch.optim.Optimizer,
    setup: dict[str, Any],
) -> LeftOff | None:
    """Return where `job["resume"]` left off; None to start from the beginning: a bad one ends no job."""
    if job.get("resume"):
        path, epochs = child.root / job["resume"], job["options"]["epochs"]
        try:
            return sam2_kept.restore(path, output, network, optimizer, setup, epochs)
        except Exception as error:  # noqa: BLE001  whatever a stranger's file makes the loader raise
            said = training_faults.without_root(str(error), child.root)
            print(f"The checkpoint cannot be used, the training starts from the beginning: {said}")  # noqa: T201
            _empty(child)
    checkpoint_file.discard(child.directory)
    return None


def _epoch(training: _Training, embeddings: EmbeddingsFile, step: Step) -> tuple[dict[str, float], float]:
    """Train for an epoch, or until the time is over; return its losses and its last learning rate."""
    options, progress, samples = training.options, training.progress, training.samples["train"]
    epoch, steps = progress.epochs_done, -(-len(samples) // options.batch)
    progress.start_epoch()
    sums: Counter[str] = Counter()
    done, factor = 0, 0.0
    with contextlib.closing(sam2_batches.batches(samples, embeddings, options, epoch)) as batches:
        for batch in batches:
            training.child.check_stop()
            factor = sam2_optimizer.learning_rate(options, epoch * steps + done, steps)
            sums.update(step.run(batch, (options.seed, epoch, done), factor))
            done += 1
            if progress.step(done, steps):
                break
    return {name: total / done for name, total in sums.items()}, training.lr0 * factor


def _ended_by(training: _Training, course: Course, score: sam2_score.Score) -> str | None:
    """Return by what a training ends with an epoch of that score; None where another follows."""
    progress, patience = training.progress, training.options.patience
    done = progress.epochs_done + 1
    without_better = 0 if course.is_better(score) else course.epochs_without_better + 1
    if progress.is_out_of_time or done >= progress.epochs or 0 < patience <= without_better:
        return progress.ended_by(done)
    return None


def _metrics(
    training: _Training, course: Course, proof: Proof, before: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Return what was measured, and what is measured now: on test, beside base; the active model on val."""
    assert course.best is not None  # every training has an epoch
    report = sam2_score.report(course.best, course.base, course.box_as_mask, course.best_epoch)
    report.update(test=None, active=None)
    network, progress = training.network, training.progress
    if "test" in training.samples:
        test = training.proof("test", None)
        progress.evaluate("the best epoch on test")
        report["test"] = test.measure(network).to_dict()
        progress.evaluate("the base model on test")
        trained = sam2_kept.copy(network)
        sam2_kept.load(network, before)
        report["test"]["base"] = test.measure(network).to_dict()
        sam2_kept.load(network, trained)
    if training.job.get("active_model"):
        progress.evaluate("the active model on val")
        report["active"] = _active(training)
    return report


def _active(training: _Training) -> dict[str, Any]:
    """Return the active model's figures on val, at the size that it is served at, or ``{"error"}``.

    The training is good whatever is wrong with the active model: nothing here may cost it.
    """
    job, child = training.job, training.child
    try:
        active = BaseModel.read(child.root / job["active_model"], image_px=None)
        network = Network(active.model, "decoder", training.network.device)
        active.serve(network)
        return training.proof("val", None).measure(network).to_dict()
    except StopRequestedError:
        raise
    except Exception as error:  # noqa: BLE001  told in the report, with its traceback in the log
        traceback.print_exc()
        fault = training_faults.explain(
            error, batch=1, imgsz=training.options.imgsz, started=True, root=child.root
        )
        return {"error": fault.message}


def _effective(training: _Training, caches: dict[str, Any]) -> dict[str, Any]:
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
        "precision": network.precision,
        "caches": caches,
        "images_at_once": training.memory.images_at_once,
        "objects_at_once": training.memory.objects_at_once,
        "parameters_trained": trained,
        "parameters": sum(parameter.numel() for parameter in network.model.parameters()),
    }


def _write(
    training: _Training,
    course: Course,
    metrics: dict[str, Any],
    effective: dict[str, Any],
    versions: dict[str, str | None],
) -> None:
    """Write what is delivered beside the sheet."""
    directory, options, base = training.child.directory, training.options, training.base
    _draw_curves(training.child, course.history)
    args = yaml.safe_dump(effective, sort_keys=False, allow_unicode=True)
    (directory / "args.yaml").write_text(args, encoding="utf-8")
    metadata = {
        "config": base.architecture,
        "base_model": base.name,
        "base_sha256": base.sha256,
        "image_px": options.imgsz,
        "trained": options.train,
        "classes": training.job["names"],
        "metrics": metrics,
        "versions": versions,
        "multimask_fallback": options.box_share < 1,
        "epochs": course.best_epoch,
    }
    sam2_publish.write(directory / "best.pt", training.network.model, metadata)


def _draw_curves(child: Child, history: tuple[dict[str, Any], ...]) -> None:
    sam2_curves.curves(history, child.directory / "results.csv", child.directory / "curves.png")
