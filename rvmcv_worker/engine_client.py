"""The engines as the daemon's other parts use them: ask about an image, get its result.

One engine process for each trust class, started when it is first asked and stopped when it has been idle.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rvmcv_worker.engine_wire import Options, Queue, Trust
from rvmcv_worker.interrupt import Interrupt


@dataclass(frozen=True)
class Ask:
    """What is asked about an image; both models are in the store, by sha256."""

    trust: Trust
    queue: Queue
    model_sha256: str
    options: Options
    #: A SAM2 for the masks; None for none, or for the detector's own (`options.segmentation`).
    segmenter_sha256: str | None = None


@dataclass(frozen=True)
class InferResult:
    """What an engine answered, validated."""

    #: ``image_size``, ``detections``, ``backend``, ``precision``, ``batch``, ``device``, and ``timings`` in
    #: seconds.
    result: dict[str, Any]
    #: The image with boxes, labels and masks drawn, a JPEG; None unless it was asked for.
    picture: bytes | None = None


class Engines:
    """Both engines; safe for several threads."""

    def infer(self, ask: Ask, image: bytes, *, interrupt: Interrupt) -> InferResult:
        """Return the answer, when it has come; raises `JobError`, or what the job's `interrupt` asks for."""
        raise NotImplementedError

    def submit(self, ask: Ask, image: bytes) -> Future[InferResult]:
        """Ask and return at once, but for the copying of a model that the engine does not have yet.

        The future raises `JobError`. Cancelled, its answer is dropped when it comes. How many are asked at
        once is the caller's to bound: each holds its image in memory.
        """
        raise NotImplementedError
