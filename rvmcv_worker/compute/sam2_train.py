"""Fine-tunes SAM2 on images, and proves on val whether that helped. Read `run` from top to bottom."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rvmcv_worker.compute import (
    runtime,
    sam2_batches,
    sam2_delivery,
    sam2_kept,
    sam2_optimizer,
    training_faults,
    ultralytics_env,
)
from rvmcv_worker.compute.child import Child, StopRequestedError
from rvmcv_worker.compute.sam2_embeddings import Embeddings
from rvmcv_worker.compute.sam2_kept import Course, Sam2Checkpoints
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.compute.sam2_proof import Proof
from rvmcv_worker.compute.sam2_score import Score
from rvmcv_worker.compute.sam2_sheet import Sheet
from rvmcv_worker.compute.sam2_step import Step
from rvmcv_worker.compute.sam2_training import Training
from rvmcv_worker.errors import InvalidJobError, ModelInvalidError
from rvmcv_worker.sam2_options import Sam2Options


def run(job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Train, or go on where `job["resume"]` left off; measure and write what is delivered.

    Returns ``{"model", "metrics", "files", "effective", "versions", "epochs", "attempts", "ended_by"}``;
    `ended_by` is ``epochs``, ``patience`` or ``time_limit``. Raises `ModelInvalidError`, `InvalidJobError`,
    `DatasetInvalidError`, `OutOfGpuMemoryError`, …, with
    ``detail = {"files", "epochs", "batch", "imgsz", "objects"}``.
    """
    ultralytics_env.isolate_others(child.directory)
    options = Sam2Options.model_validate(job["options"])
    runtime.be_deterministic(options.seed)
    output = sam2_delivery.empty(child.directory)
    with contextlib.ExitStack() as stack:
        reached = stack.enter_context(_faults(child, options))
        training = Training.begin(job, child, options, output)
        reached.kept, left_off = training.kept, training.left_off
        network, progress, samples = training.network, training.progress, training.samples

        # What the model is worth before the first step, and the box itself in the place of a mask.
        wanted = sam2_batches.wanted_upright(samples["val"])
        val = stack.enter_context(training.encoded("val", wanted, job["cache_bytes"]))
        proof, sheet = training.proof("val", val), Sheet(samples["val"], job["names"])
        progress.measure("the base model")
        training.base.serve(network)
        with sam2_delivery.beside_the_model():
            sheet.before(proof, network)
        course = left_off.course if left_off else Course(proof.measure(network), proof.box_as_mask())
        before = sam2_kept.copy(network) if "test" in samples else {}

        # The training, unless an earlier child came to its end.
        network.model.sam_mask_decoder.dynamic_multimask_via_stability = options.box_share < 1
        if left_off:
            left_off.apply(network, training.optimizer)
        ended_by, caches = left_off.state.ended_by if left_off else None, {"val": val.describe()}
        if ended_by is None:
            epochs = range(progress.epochs_done, options.epochs)
            wanted = sam2_batches.wanted_in_training(samples["train"], options, epochs)
            left_bytes = job["cache_bytes"] - (val.kept_bytes if val.mode == "disk" else 0)
            train = stack.enter_context(training.encoded("train", wanted, left_bytes))
            caches["train"] = train.describe()
            step = Step(network, training.optimizer, options, training.memory, child.check_stop)
            progress.start()
        while ended_by is None:
            losses, lr = _epoch(training, train, step)
            score = _score(proof, network)
            ended_by = _ended_by(training, course, score)
            entry = progress.finish_epoch(losses, score, course.beside, lr=lr, is_last=ended_by is not None)
            course = course.after(entry, score)
            training.kept.after_epoch(course, ended_by=ended_by)

        # What the best epoch is worth, and all that is delivered.
        sam2_kept.load_best(network, output)
        progress.evaluate("the best epoch")
        with sam2_delivery.beside_the_model():
            sheet.after(proof, network)
            sheet.write(child.directory / "masks.jpg")
        metrics = sam2_delivery.metrics(training, course, before)
        effective = sam2_delivery.effective(training, caches)
        versions = runtime.versions(network.device.type == "cuda")
        sam2_delivery.write(training, course, metrics, effective, versions)
        return {
            "model": "best.pt",
            "metrics": metrics,
            "files": sam2_delivery.files(child.directory),
            "effective": effective,
            "versions": versions,
            "epochs": progress.epochs_done,
            "attempts": training.kept.state.attempts(),
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
            epochs = len(reached.kept.history)
            sam2_delivery.draw_curves(child.directory, reached.kept.history)
        (child.directory / "best.pt").unlink(missing_ok=True)
        fault.detail = {
            "epochs": epochs,
            "batch": options.batch,
            "imgsz": options.imgsz,
            "objects": options.objects,
            **(fault.detail or {}),
            "files": sam2_delivery.files(child.directory),
        }
        raise fault from error


def _epoch(training: Training, embeddings: Embeddings, step: Step) -> tuple[dict[str, float], float]:
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


def _score(proof: Proof, network: Network) -> Score:
    """Measure an epoch; what no longer computes did before the training."""
    try:
        return proof.measure(network)
    except ModelInvalidError as error:
        raise InvalidJobError(
            "the training diverged (masks that are no finite numbers); use a smaller lr0"
        ) from error


def _ended_by(training: Training, course: Course, score: Score) -> str | None:
    """Return by what a training ends with an epoch of that score; None where another follows."""
    progress, patience = training.progress, training.options.patience
    done = progress.epochs_done + 1
    without_better = 0 if course.is_better(score) else course.epochs_without_better + 1
    if progress.is_out_of_time or done >= progress.epochs or 0 < patience <= without_better:
        return progress.ended_by(done)
    return None
