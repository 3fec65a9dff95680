"""Fine-tunings of SAM2 small enough for a test: a drawn data set as prepared, and the train child on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from rvmcv_worker.compute import instances
from rvmcv_worker.compute.child import Child, run_task
from rvmcv_worker.compute.instances import Instance, LabelledImage
from tests.compute_child import ComputeChild

NAMES = ["bottle", "can"]

#: Quick, and enough of everything: both kinds of prompt, a correction, two batches an epoch.
OPTIONS: dict[str, Any] = {
    "epochs": 2,
    "imgsz": 64,
    "batch": 2,
    "objects": 2,
    "clicks": 1,
    "seed": 5,
    "warmup_epochs": 0.5,
}


def draw_prepared(root: Path, images: dict[str, int] | None = None, edge_px: int = 96, seed: int = 0) -> None:
    """Write `root`/prepare as the prepare child leaves it: two curved objects on noise in each image."""
    random = np.random.default_rng(seed)
    data = root / "prepare" / "data"
    for split, count in (images or {"train": 4, "val": 2}).items():
        (data / "images" / split).mkdir(parents=True)
        labelled = []
        for number in range(count):
            picture = random.integers(0, 90, (edge_px, edge_px, 3), dtype=np.uint8)
            found = []
            for class_id in range(len(NAMES)):
                polygon = _curved(random, edge_px, class_id)
                colour = [0, 0, 0]
                colour[class_id] = 255
                cv2.fillPoly(picture, [polygon.astype(np.int32)], colour)
                found.append(Instance(class_id, ((polygon / edge_px).astype(np.float32),)))
            path = f"images/{split}/{number:03}.png"
            cv2.imwrite(str(data / path), picture)
            labelled.append(LabelledImage(path, edge_px, edge_px, tuple(found)))
        instances.write(data / "instances" / f"{split}.jsonl", labelled)


def sam2_job(
    *, options: dict[str, Any] | None = None, names: list[str] = NAMES, **changed: Any
) -> dict[str, Any]:
    """Return the job of a train child from scratch, with `options` and other keys changed."""
    return {
        "task": "train_sam2",
        "attempt": 1,
        "model": "scratch",
        "architecture": "sam2.1_hiera_tiny",
        "names": names,
        "data": "prepare/data",
        "options": {**OPTIONS, **(options or {})},
        "active_model": None,
        "device": "cpu",
        "time_limit_h": None,
        "resume": None,
        "cache_bytes": 10**9,
        **changed,
    }


def train_sam2(root: Path, name: str = "train", **job: Any) -> ComputeChild:
    """Start a training on the data set in `root`, as a process of its own on one thread."""
    return ComputeChild(root, name, sam2_job(**job), env={"OMP_NUM_THREADS": "1"})


@dataclass
class ChildHere(Child):
    """A train child in the test's own process, which spares it the imports."""

    #: What is said at which it is told to stop.
    stop_at: str = ""
    received: list[dict[str, Any]] = field(default_factory=list)

    def report(self, **progress: Any) -> None:
        self.received.append(json.loads(json.dumps(progress)))
        if self.stop_at and self.stop_at in progress.get("message", ""):
            self.stop_requested.set()

    @property
    def history(self) -> list[dict[str, Any]]:
        return [entry for message in self.received for entry in message.get("history", [])]

    @property
    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads((self.directory / "result.json").read_text())
        return answer

    @property
    def result(self) -> dict[str, Any]:
        assert self.answer["ok"], self.answer
        result: dict[str, Any] = self.answer["result"]
        return result


def train_here(root: Path, name: str = "train", *, stop_at: str = "", **job: Any) -> ChildHere:
    """Run a training on the data set in `root` as `train_sam2` does, to its end."""
    directory = root / name
    directory.mkdir(exist_ok=True)
    child = ChildHere(root, directory, progress_fd=-1, stop_at=stop_at)
    with _as_in_a_process():
        run_task(sam2_job(**job), child)
    return child


@contextmanager
def _as_in_a_process() -> Iterator[None]:
    """Undo what a child does to its process."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def _curved(random: np.random.Generator, edge_px: int, class_id: int) -> np.ndarray[Any, Any]:
    """Return the outline of a bent blob, (n, 2) in pixels, wholly within the image."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = 1 + 0.25 * np.cos((2 + class_id) * angles + random.uniform(0, 6))
    size = edge_px * np.array((0.12, 0.2) if class_id else (0.2, 0.12)) * random.uniform(0.8, 1.1)
    centre = edge_px * random.uniform(0.3, 0.7, 2)
    outline = centre + size * radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.clip(outline, 0, edge_px - 1)
