"""Fine-tuning SAM2: what keeping the frozen encoder's output is worth, what it learns, and what is exact.

Random weights: they take as long as others. hiera-tiny throughout.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor

from benchmarks.figures import Figure
from rvmcv_worker.compute import instances, sam2_batches, sam2_checkpoint, sam2_optimizer
from rvmcv_worker.compute.sam2_embeddings import Embeddings
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.compute.sam2_proof import Proof
from rvmcv_worker.compute.sam2_samples import Samples
from rvmcv_worker.compute.sam2_step import Step
from rvmcv_worker.sam2_options import Sam2Options
from tests.sam2_jobs import NAMES, draw_prepared, train_sam2

IMAGE_PX, PICTURE_PX = 1024, 640
ROUNDS = 3
OVERFIT_PX, OVERFIT_STEPS, OVERFIT_GOAL = 128, 300, 0.95
EPOCHS = 4
_MB = 1024**2
_ARCHITECTURE = "sam2.1_hiera_tiny"


def measure() -> list[Figure]:
    """Time steps side by side; overfit; save and load; watch a whole training; train twice."""
    with tempfile.TemporaryDirectory(prefix="rvmcv-sam2-") as folder:
        root = Path(folder)
        return [
            *_steps(root / "steps"),
            *_overfit(root / "overfit"),
            *_memory(root / "memory"),
            *_delivered_and_repeated(root),
        ]


@dataclass
class _Training:
    """A network with what its steps need, without a child around it."""

    network: Network
    samples: Samples
    embeddings: Embeddings
    options: Sam2Options
    step: Step
    memory: Memory
    taken: int = 0

    def take(self, lr_factor: float = 1.0) -> float:
        """Take the next step, an epoch of one batch; return its seconds, making the batch included."""
        started_s = time.perf_counter()
        for batch in sam2_batches.batches(self.samples, self.embeddings, self.options, self.taken):
            self.step.run(batch, (self.options.seed, self.taken, 0), lr_factor)
        self.taken += 1
        return time.perf_counter() - started_s


@contextmanager
def _training(root: Path, lr0: float, **options: Any) -> Iterator[_Training]:
    wishes = Sam2Options(**options)
    torch.manual_seed(wishes.seed)
    model = sam2_checkpoint.build(_ARCHITECTURE, image_px=wishes.imgsz)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Network(model, wishes.train, device)
    data = root / "prepare" / "data"
    samples = Samples(data, instances.read(data / "instances" / "train.jsonl"), wishes.imgsz)
    memory = Memory(wishes, device, print)
    wanted = sam2_batches.wanted_in_training(samples, wishes, range(OVERFIT_STEPS))
    path = root / f"{wishes.train}-{wishes.cache}.f16"
    with Embeddings(samples, network, memory, wishes, wanted, path=path, limit_bytes=10**9) as embeddings:
        embeddings.fill(lambda _done, _of, _left_s: None)
        step = Step(network, sam2_optimizer.optimizer(network, wishes, lr0), wishes, memory, lambda: None)
        yield _Training(network, samples, embeddings, wishes, step, memory)


def _steps(root: Path) -> list[Figure]:
    """Take steps on a picture of one object, as most photographs are, and of four; trainings in turn."""
    draw_prepared(root, {"train": 1}, edge_px=PICTURE_PX)
    _draw_again(root)
    return [*_steps_on(root, 1, (">= 4", ">= 10")), *_steps_on(root, 4, ("", ""))]


def _draw_again(root: Path) -> None:
    """Label each object of the picture twice: four objects of it then."""
    path = root / "prepare" / "data" / "instances" / "train.jsonl"
    (labelled,) = instances.read(path)
    instances.write(path, [dataclasses.replace(labelled, instances=labelled.instances * 2)])


def _steps_on(root: Path, objects: int, goals: tuple[str, str]) -> list[Figure]:
    options: dict[str, Any] = {
        "imgsz": IMAGE_PX,
        "batch": 1,
        "objects": objects,
        "fliplr": 0.0,
        "seed": 1,
    }
    with (
        _training(root, 1e-5, cache="disk", **options) as kept,
        _training(root, 1e-5, cache="off", **options) as encoded,
        _training(root, 1e-6, cache="off", train="all", **options) as whole,
    ):
        every: tuple[list[float], ...] = ([], [], [])
        for turn in range(ROUNDS + 1):  # the first warms up
            for training, taken in zip((kept, encoded, whole), every, strict=True):
                seconds = training.take()
                if turn:
                    taken.append(seconds)
    kept_s, encoded_s, whole_s = (statistics.median(taken) for taken in every)
    of = f"{objects} object{'s' * (objects > 1)}"
    name = f"a step of the decoder, one image of {IMAGE_PX} px, {of}, 2 clicks, encoding kept"
    return [
        Figure(name, kept_s, "s", "", "the same step with its encoding", encoded_s),
        Figure(f"{of}: times faster than the same step with its encoding", encoded_s / kept_s, "x", goals[0]),
        Figure(name, kept_s, "s", "", "Meta's way: all parameters, nothing kept", whole_s),
        Figure(f"{of}: times faster than Meta's way", whole_s / kept_s, "x", goals[1]),
    ]


def _overfit(root: Path) -> list[Figure]:
    """Train on two pictures, from scratch with a frozen encoder, until the model knows them."""
    draw_prepared(root, {"train": 2})
    options: dict[str, Any] = {"imgsz": OVERFIT_PX, "batch": 2, "fliplr": 0.0, "seed": 1, "cache": "ram"}
    with _training(root, 1e-3, **options) as training:
        proof = Proof(
            training.samples,
            training.embeddings,
            NAMES,
            training.memory,
            lambda: None,
            lambda _done, _of: None,
        )
        first = proof.measure(training.network)
        score = first
        while training.taken < OVERFIT_STEPS and score.miou < OVERFIT_GOAL:
            for _ in range(10):
                training.take()
            score = proof.measure(training.network)
    goal = f">= {OVERFIT_GOAL} within {OVERFIT_STEPS} steps"
    return [
        Figure("overfit: train mIoU with boxes", score.miou, "", goal, "before the first step", first.miou),
        Figure("overfit: steps that it took", training.taken, "steps", f"<= {OVERFIT_STEPS}"),
    ]


def _memory(root: Path) -> list[Figure]:
    """Watch the peak of a training's resident memory in each epoch."""
    draw_prepared(root, {"train": 4, "val": 2}, edge_px=PICTURE_PX)
    options = {"imgsz": IMAGE_PX, "epochs": EPOCHS, "batch": 2, "clicks": 2, "cache": "disk", "patience": 0}
    child = train_sam2(root, options=options)
    process = psutil.Process(child.process.pid)
    peaks = [_peak_bytes(process) for message in child.messages() if message.get("history")]
    answer = child.result()
    if not answer["ok"] or len(peaks) != EPOCHS:
        raise RuntimeError(f"the training failed: {answer}")
    return [
        Figure(f"peak memory of a decoder's training, {IMAGE_PX} px, CPU", max(peaks) / _MB, "MB", "printed"),
        Figure("memory, last epoch", peaks[-1] / _MB, "MB", "flat in 5 %", "second epoch", peaks[1] / _MB),
    ]


def _peak_bytes(process: psutil.Process) -> int:
    """Return the most that a process has had resident since the last call, mapped files included (VmHWM)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return int(line.split()[1]) * 1024


def _delivered_and_repeated(root: Path) -> list[Figure]:
    """Train twice with one seed; then ask a model as it is in memory, and as `build_sam2` loads its file."""
    weights = []
    for name in ("first", "second"):
        draw_prepared(root / name)
        answer = train_sam2(root / name, options={"epochs": 2}).finish()
        if not answer["ok"]:
            raise RuntimeError(f"the training failed: {answer}")
        weights.append(root / name / "train" / "best.pt")
    one, other = (torch.load(path, weights_only=True)["model"] for path in weights)
    differ = sum(not torch.equal(tensor, other[key]) for key, tensor in one.items())

    ours, _ = sam2_checkpoint.open_sam2(weights[0], image_px=IMAGE_PX)
    theirs = build_sam2(sam2_checkpoint.CONFIGS[_ARCHITECTURE], str(weights[0]), device="cpu")
    picture = np.random.default_rng(0).integers(0, 255, (PICTURE_PX, PICTURE_PX, 3), np.uint8)
    cv2.ellipse(picture, (300, 300), (90, 200), 20, 0, 360, (20, 200, 60), -1)
    answers = []
    for model in (ours, theirs):
        predictor = SAM2ImagePredictor(model)
        predictor.set_image(picture)
        masks, _, logits = predictor.predict(box=np.array([200, 90, 410, 510]), multimask_output=False)
        answers.append((masks, logits))
    wrong = sum(int(np.count_nonzero(a != b)) for a, b in zip(*answers, strict=True))
    return [
        Figure("two trainings with one seed, CPU: tensors that differ", differ, "tensors", "0"),
        Figure("saved, loaded by build_sam2: numbers of a mask that differ", wrong, "numbers", "0"),
    ]
