"""Ultralytics' trainer as one rank of several; made after `ultralytics_env.isolate`, in a rank only."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.utils.torch_utils import strip_optimizer


def of_task(label_task: str) -> type[DetectionTrainer]:
    """Return the trainer for ``detect`` or ``segment``."""
    base: type[DetectionTrainer] = {"detect": DetectionTrainer, "segment": SegmentationTrainer}[label_task]

    class RankTrainer(base):  # type: ignore[misc]
        """Trains as its base does, and leaves the evaluation of best.pt to the launching process.

        On a CPU, where Ultralytics knows one process only, the ranks speak gloo.
        """

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self.world_size = int(os.environ["WORLD_SIZE"])

        def _setup_ddp(self) -> None:
            if self.device.type == "cuda":
                super()._setup_ddp()
            else:
                distributed.init_process_group("gloo")

        def _setup_train(self) -> None:
            with _any_device(self.device):
                super()._setup_train()

        def final_eval(self) -> None:
            """Strip the checkpoints, once."""
            if distributed.get_rank() == 0:
                results = strip_optimizer(self.last).get("train_results")
                if self.best.exists():
                    strip_optimizer(self.best, updates={"train_results": results})

    return RankTrainer


@contextmanager
def _any_device(device: torch.device) -> Iterator[None]:
    """Let Ultralytics wrap a model on a CPU: it always names a GPU's index, which torch refuses there."""
    if device.type == "cuda":
        yield
        return
    wrap = nn.parallel.DistributedDataParallel
    nn.parallel.DistributedDataParallel = functools.partial(_without_devices, wrap)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        nn.parallel.DistributedDataParallel = wrap  # type: ignore[misc]


def _without_devices(wrap: Any, module: nn.Module, device_ids: object, **options: Any) -> Any:  # noqa: ARG001
    return wrap(module, **options)
