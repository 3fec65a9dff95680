"""Images through the models: load, detect, segment, write down. Used by an engine's compute thread alone.

Call `ultralytics_env.isolate` first: this module imports Ultralytics.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from rvmcv_worker.compute import engine_faults
from rvmcv_worker.compute.detector import Detector, open_detector
from rvmcv_worker.compute.embedding_cache import EmbeddingCache
from rvmcv_worker.compute.engine_queue import Decoded
from rvmcv_worker.compute.engine_result import ResultWriter, refuse_large_picture
from rvmcv_worker.compute.found import Found
from rvmcv_worker.compute.model_cache import ModelCache
from rvmcv_worker.compute.training_faults import without_root
from rvmcv_worker.engine_wire import Backend, Model, Options, Request, Stage
from rvmcv_worker.engine_wire import Segmenter as SegmenterFile
from rvmcv_worker.errors import JobError, UnsupportedJobError

if TYPE_CHECKING:
    from rvmcv_worker.compute.segmenter import Segmenter

DoneT = TypeVar("DoneT")


@dataclass(frozen=True)
class Answer:
    """What one request is answered with: the result as JSON, and the drawn picture if it was asked for."""

    result: bytes
    picture: bytes


@dataclass(frozen=True)
class _Models:
    detector: Detector
    segmenter: Segmenter | None
    load_s: float


@dataclass(frozen=True)
class _Detected:
    found: Found
    detect_s: float
    #: How many images went through the detector together.
    batch: int


class Inference:
    """Models on a device, and what they make of images."""

    def __init__(
        self,
        root: Path,
        *,
        device: str,
        models: ModelCache,
        embeddings: EmbeddingCache,
        tell: Callable[[int, Stage], None],
    ) -> None:
        self._root = root
        self._device = device
        self._models = models
        self._embeddings = embeddings
        self._tell = tell

    def group(self, item: Decoded) -> Hashable:
        """Return what images must have in common to go through the detector together.

        One that a segmenter awaits goes alone: that takes so long that company at the detector saves nothing.
        """
        request = item.request
        key = _detector_key(request.model, request.options)
        detector = self._models.peek(key)
        shape = detector.letterboxed(*item.size) if isinstance(detector, Detector) else item.size
        return key, request.options, shape, request.id if _segmenter_of(request) else None

    def serve(self, batch: list[Decoded]) -> Iterator[tuple[Request, Answer | JobError]]:
        """Yield each request of a batch, all of one `group`, with its answer, as soon as that is known."""
        request = batch[0].request
        try:
            models = self._attempt(request, lambda: self._load(batch))
        except JobError as error:
            yield from ((item.request, error) for item in batch)
            return
        for item in batch:
            self._tell(item.request.id, Stage.INFER)
        for item, detected in zip(batch, self._detect(batch, models), strict=True):
            yield item.request, self._finish(item, detected, models)

    def _finish(self, item: Decoded, detected: _Detected | JobError, models: _Models) -> Answer | JobError:
        if isinstance(detected, JobError):
            return detected
        waited_s = time.monotonic() - item.ready_s - models.load_s - detected.detect_s
        try:
            return self._attempt(
                item.request, lambda: self._write(item, detected, models, max(waited_s, 0.0))
            )
        except JobError as error:
            return error

    def _load(self, batch: list[Decoded]) -> _Models:
        started_s = time.monotonic()
        request = batch[0].request
        keys = _keys(request)
        if not all(key in self._models for key in keys):
            for item in batch:
                self._tell(item.request.id, Stage.LOAD)
        detector = self._models.get(keys[0], lambda: self._open_detector(request.model, request.options))
        segmenter = None
        if file := _segmenter_of(request):
            segmenter = self._models.get(_segmenter_key(file), lambda: self._open_segmenter(file))
        for dropped in self._models.trim(keys):
            sys.stdout.write(f"memory is short: dropped {dropped}\n")
        if request.options.segmentation and not segmenter and detector.label_task != "segment":
            raise UnsupportedJobError(
                f"the model is a {detector.label_task} model and has no masks of its own: "
                "name a SAM2 segmenter, or a YOLO11-seg model"
            )
        return _Models(detector, segmenter, load_s=time.monotonic() - started_s)

    def _open_detector(self, model: Model, options: Options) -> Detector:
        """Open it on the backend that is asked for, or on torch where its export does not run."""
        path, backend = self._root / model.path, model.backend
        if not backend.path:
            return open_detector(path, backend, imgsz=options.imgsz, device=self._device)
        export = dataclasses.replace(backend, path=str(self._root / backend.path))
        try:
            return open_detector(path, export, imgsz=options.imgsz, device=self._device)
        except Exception as error:
            if engine_faults.is_out_of_memory(engine_faults.behind(error)):
                raise
            why = without_root(str(error), self._root)
            sys.stdout.write(f"{backend.path} does not run by {backend.name}, torch instead: {why}\n")
        torch = Backend("torch-cpu" if self._device == "cpu" else "torch-cuda", "fp32")
        return open_detector(path, torch, imgsz=options.imgsz, device=self._device)

    def _open_segmenter(self, file: SegmenterFile) -> Segmenter:
        from rvmcv_worker.compute.segmenter import open_segmenter  # only now: sam2 takes its time

        return open_segmenter(self._root / file.path, device=self._device, cache=self._embeddings)

    def _detect(self, batch: list[Decoded], models: _Models) -> list[_Detected | JobError]:
        """Detect in all images together; where that fails, in each alone: one never fails another."""
        request = batch[0].request
        options = request.options
        started_s = time.monotonic()
        try:
            found = self._attempt(
                request,
                lambda: models.detector.detect(
                    [item.image for item in batch],
                    confidence=options.confidence,
                    iou=options.iou,
                    max_detections=options.max_detections,
                    masks=options.segmentation and models.segmenter is None,
                ),
            )
        except JobError as error:
            if len(batch) == 1:
                return [error]
            return [detected for item in batch for detected in self._detect([item], models)]
        detect_s = time.monotonic() - started_s
        return [_Detected(each, detect_s, len(batch)) for each in found]

    def _write(self, item: Decoded, detected: _Detected, models: _Models, waited_s: float) -> Answer:
        started_s = time.monotonic()
        options, found, detector = item.request.options, detected.found, models.detector
        writer = ResultWriter(found, detector.names, options.mask_format)
        masks: Iterable[NDArray[np.bool_]] | None = None
        if options.segmentation and len(found.boxes):
            masks = writer.with_masks(self._masks(item, found, models))
        picture = b""
        if options.annotated:
            from rvmcv_worker.compute import annotate  # only now: supervision takes its time

            picture = annotate.draw(
                item.image, found.boxes, found.scores, found.classes, detector.names, masks
            )
            refuse_large_picture(picture)
        for _ in masks or ():  # those that were not drawn
            pass
        timings = {
            "queue": item.queued_s + waited_s,
            "decode": item.decode_s,
            "load": models.load_s,
            "detect": detected.detect_s,
            "segment": writer.segment_s,
            "encode": time.monotonic() - started_s - writer.segment_s,
        }
        about = {
            "image_size": item.size,
            "backend": detector.backend,
            "precision": detector.precision,
            "batch": detected.batch,
            "device": detector.device,
            "timings": {name: round(seconds, 6) for name, seconds in timings.items()},
        }
        return Answer(writer.to_json(about), picture)

    def _masks(self, item: Decoded, found: Found, models: _Models) -> Iterable[NDArray[np.bool_]]:
        if models.segmenter:
            return models.segmenter.segment(item.image, found.boxes, image_key=item.image_key)
        assert found.masks is not None
        return found.masks

    def _attempt(self, request: Request, work: Callable[[], DoneT]) -> DoneT:
        def make_room() -> None:
            self._embeddings.clear()
            self._models.drop_all_but(_keys(request))

        return engine_faults.attempt(work, make_room, self._root)


def _keys(request: Request) -> list[Hashable]:
    keys = [_detector_key(request.model, request.options)]
    if file := _segmenter_of(request):
        keys.append(_segmenter_key(file))
    return keys


def _segmenter_of(request: Request) -> SegmenterFile | None:
    return request.segmenter if request.options.segmentation else None


def _detector_key(model: Model, options: Options) -> Hashable:
    return "detector", model.sha256, model.backend.name, model.backend.precision, options.imgsz


def _segmenter_key(file: SegmenterFile) -> Hashable:
    return "segmenter", file.sha256
