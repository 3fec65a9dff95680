"""What there is of a SAM2 training from before its first step until after its last."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rvmcv_worker.compute import (
    checkpoint_file,
    instances,
    runtime,
    sam2_kept,
    sam2_optimizer,
    training_faults,
)
from rvmcv_worker.compute.checkpoint_file import Run, State
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.sam2_base_model import BaseModel
from rvmcv_worker.compute.sam2_embeddings import Embeddings, Key
from rvmcv_worker.compute.sam2_kept import LeftOff, Sam2Checkpoints
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.compute.sam2_progress import Sam2Progress
from rvmcv_worker.compute.sam2_proof import Proof
from rvmcv_worker.compute.sam2_samples import Samples
from rvmcv_worker.errors import DatasetInvalidError
from rvmcv_worker.sam2_options import Sam2Options

#: Learning rate where the job names none. With pretrained weights a decoder alone takes ten times what Meta's
#: recipe gives the whole model.
_LR0 = {"decoder": 5e-5, "decoder+neck": 5e-5, "all": 5e-6}
_LR0_SCRATCH = 1e-3


@dataclass(frozen=True)
class Training:
    """What is there from before the first step until after the last."""

    job: dict[str, Any]
    child: Child
    options: Sam2Options
    #: As options say, or by what is trained.
    lr0: float
    base: BaseModel
    network: Network
    optimizer: torch.optim.AdamW
    memory: Memory
    progress: Sam2Progress
    kept: Sam2Checkpoints
    #: By split: train, val, and test if there is one.
    samples: dict[str, Samples]
    #: Where an earlier child left off; not in force yet.
    left_off: LeftOff | None

    @classmethod
    def begin(cls, job: dict[str, Any], child: Child, options: Sam2Options, output: Path) -> Training:
        """Open the base model and the data; `output` is the folder for what the training saves."""
        base = BaseModel.open(job, child.root, options)
        network = Network(base.model, options.train, runtime.device(job["device"]))
        lr0 = options.lr0 or (_LR0[options.train] if base.sha256 else _LR0_SCRATCH)
        optimizer = sam2_optimizer.optimizer(network, options, lr0)
        setup = sam2_kept.setup(network, train=options.train, imgsz=options.imgsz, classes=job["names"])
        left_off = _left_off(job, child, output, network, optimizer, setup)
        earlier = left_off.state if left_off else State()
        progress = Sam2Progress(child, options.epochs, job.get("time_limit_h"), earlier)
        this_run = Run(job.get("attempt", 1), epochs=0, batch_size=options.batch, img_size=options.imgsz)
        kept = Sam2Checkpoints(child, output, progress, earlier, network, optimizer, setup, this_run)
        kept.history = left_off.course.history if left_off else ()
        progress.begin("reading the labels")
        memory = Memory(options, network.device, progress.say)
        return cls(
            job=job,
            child=child,
            options=options,
            lr0=lr0,
            base=base,
            network=network,
            optimizer=optimizer,
            memory=memory,
            progress=progress,
            kept=kept,
            samples=_samples(job, options, child),
            left_off=left_off,
        )

    def encoded(self, split: str, wanted: list[Key], limit_bytes: int) -> Embeddings:
        """Return the frozen output of a split, as much of it as `limit_bytes` hold encoded now."""
        embeddings = Embeddings(
            self.samples[split],
            self.network,
            self.memory,
            self.options,
            wanted,
            path=self.child.directory / f"{split}.f16",
            limit_bytes=limit_bytes,
            memory_limit_bytes=self.job.get("memory_limit_bytes"),
            check_stop=self.child.check_stop,
        )
        if embeddings.planned:
            self.progress.encode(split)
            embeddings.fill(self.progress.encoded)
        self.progress.say(embeddings.sentence())
        return embeddings

    def proof(self, split: str, embeddings: Embeddings | None) -> Proof:
        """Return the split to be measured; without `embeddings` each image is encoded each time."""
        names, tick = self.job["names"], self.progress.tick
        return Proof(self.samples[split], embeddings, names, self.memory, self.child.check_stop, tick)


def _samples(job: dict[str, Any], options: Sam2Options, child: Child) -> dict[str, Samples]:
    """Return the splits, each without what nothing can be learned from; no test where none of it is left."""
    data = child.root / job["data"]
    found = {}
    for split in ("train", "val", "test"):
        file = data / "instances" / f"{split}.jsonl"
        if split == "test" and not file.is_file():
            continue
        images = instances.read(file)
        try:
            found[split] = Samples(data, images, options.imgsz, split=split, check_stop=child.check_stop)
        except DatasetInvalidError as error:
            if split != "test":
                raise
            print(f"Nothing is measured on test: {error.message}", flush=True)  # noqa: T201
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
            shutil.rmtree(output)
            output.mkdir()
    checkpoint_file.discard(child.directory)
    return None
