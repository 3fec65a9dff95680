"""What an engine is asked, until it is answered."""

from __future__ import annotations

import collections
import dataclasses
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rvmcv_worker.engine_wire import Backend, Request, Stage
from rvmcv_worker.errors import JobError, from_code

#: For so long models whose loading ends engines are refused at once, and so many of them.
_REFUSED_S, _MOST_REFUSED = 600.0, 64

#: sha256 of the detector and of the segmenter, and what runs the former.
_Models = tuple[str, str | None, Backend | None]


@dataclass(frozen=True)
class InferResult:
    """What an engine answered, validated."""

    #: ``image_size``, ``detections``, ``backend``, ``precision``, ``batch``, ``device``, and ``timings`` in
    #: seconds.
    result: dict[str, Any]
    #: The image with boxes, labels and masks drawn, a JPEG; None unless it was asked for.
    picture: bytes | None = None


@dataclass(eq=False)
class Pending:
    """A request until it is answered."""

    request: Request
    image: bytes
    #: What runs the model fastest on the GPU `measured_on`, or on the CPU (None); None: nothing is known.
    measured: Backend | None = None
    measured_on: int | None = None
    future: Future[InferResult] = field(default_factory=Future)
    #: What the engine does with it; None while it waits for its turn.
    stage: Stage | None = None
    stage_since_s: float = 0.0
    frames: int = 0
    #: Nobody waits for the answer any more.
    abandoned: bool = False

    @property
    def models(self) -> _Models:
        """What has to be loaded for it."""
        segmenter = self.request.segmenter
        return self.request.model.sha256, segmenter.sha256 if segmenter else None, self.measured

    def abandon(self) -> None:
        """Say that nobody waits for the answer any more: it is not repeated after a crash."""
        self.abandoned = True
        self.future.cancel()

    def request_on(self, gpu: int | None) -> Request:
        """Return the request with the backend for the device that the engine has got."""
        backend = self.measured
        if backend is None or self.measured_on != gpu:
            backend = Backend("torch-cpu" if gpu is None else "torch-cuda", "fp32")
        return dataclasses.replace(
            self.request, model=dataclasses.replace(self.request.model, backend=backend)
        )

    def fail(self, error: JobError) -> None:
        """End it with an error, unless it was cancelled meanwhile."""
        if self.future.running() or self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class RefusedModels:
    """Models whose loading ended an engine in which nothing else was under way.

    Each request that names them would cost two engines, and the time that a hang takes to be seen.
    """

    def __init__(self) -> None:
        #: How they ended it, and until when that is remembered.
        self._ends: collections.OrderedDict[_Models, tuple[JobError, float]] = collections.OrderedDict()

    def add(self, pending: Pending, error: JobError) -> None:
        """Remember how loading the models of a request ended."""
        self._ends.pop(pending.models, None)
        self._ends[pending.models] = error, time.monotonic() + _REFUSED_S
        if len(self._ends) > _MOST_REFUSED:
            self._ends.popitem(last=False)

    def error(self, pending: Pending) -> JobError | None:
        """Return the error that a request is to end with; None when its models may be loaded."""
        error, until_s = self._ends.get(pending.models, (None, 0.0))
        if error is None or time.monotonic() > until_s:
            return None
        return from_code(error.code, f"{error.message} (so it was a moment ago, with the same models)")
