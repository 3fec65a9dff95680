"""A YOLO11 detector: letterbox, network, suppression of doubles, boxes in pixels of the image.

With the backend ``torch-cpu`` an image gives exactly what ``YOLO(path).predict(image)`` gives; all steps are
Ultralytics' own functions, without what its predictor does besides: loaders, callbacks, timers and result
objects for every call. Used by one thread only. Call `ultralytics_env.isolate` first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from ultralytics import YOLO
from ultralytics.data.augment import LetterBox
from ultralytics.utils import nms, ops

# Its import decides which suppression Ultralytics takes; a predictor of Ultralytics' own imports it too.
import torchvision  # noqa: F401  isort: skip

from rvmcv_worker.compute import backends, checkpoint, ultralytics_env, yolo_masks
from rvmcv_worker.compute.backends import Raw
from rvmcv_worker.compute.found import Found
from rvmcv_worker.compute.packed_masks import PackedMasks
from rvmcv_worker.engine_wire import Backend
from rvmcv_worker.errors import ModelInvalidError

#: Edge of the letterboxed image where neither the job nor the model says one, in pixels; Ultralytics' own.
DEFAULT_IMGSZ = 640
#: All sides of a letterboxed image are multiples of it, in pixels.
STRIDE = 32
#: Edge of the picture that proves that the model computes, in pixels.
_TRIAL_PX = 64


class Detector:
    """A model on a backend."""

    def __init__(
        self, yolo: YOLO, label_task: str, backend: Backend, *, imgsz: int | None, device: str
    ) -> None:
        self.names = checkpoint.class_names(yolo.model)
        #: ``detect`` or ``segment``.
        self.label_task = label_task
        #: Edge of the letterboxed image in pixels.
        self.imgsz = imgsz or own_imgsz(yolo)
        self.runs_on = backend
        self.device = device
        self._session = backends.open_session(backend, yolo.model, device)
        #: What it takes of the device's memory, estimated.
        self.memory_bytes = _memory_bytes(yolo, self.imgsz)
        self._letterbox = LetterBox((self.imgsz, self.imgsz), auto=True, stride=STRIDE)

    @property
    def backend(self) -> str:
        """The name of what runs it, as in `Backend`."""
        return self.runs_on.name

    @property
    def precision(self) -> str:
        """What it computes in, as in `Backend`."""
        return self.runs_on.precision

    def letterboxed(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of what an image of that size becomes; equal ones may go together."""
        fit = self._letterbox.get_params({"img": np.empty((height, width, 0), np.uint8)})
        new_width, new_height = fit["new_unpad"]
        return int(new_width + fit["left"] + fit["right"]), int(new_height + fit["top"] + fit["bottom"])

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[NDArray[np.uint8]],
        *,
        confidence: float,
        iou: float,
        max_detections: int,
        masks: bool,
    ) -> list[Found]:
        """Return what is in each of `images` (height x width x 3, BGR), which have equal letterboxed shapes.

        `masks` asks a YOLO11-seg model for its masks, as large as the image (``retina_masks=True``).
        """
        boxed = [self._letterbox(image=image) for image in images]
        size = len(boxed) if self._session.batches else 1
        with backends.torch_threads(self._session.threads):
            return [
                found
                for start in range(0, len(boxed), size)
                for found in self._detect(
                    boxed[start : start + size],
                    [image.shape[:2] for image in images[start : start + size]],
                    (confidence, iou, max_detections),
                    masks,
                )
            ]

    def _detect(
        self,
        batch: list[backends.Letterboxed],
        shapes: list[tuple[int, int]],
        thresholds: tuple[float, float, int],
        masks: bool,
    ) -> Iterator[Found]:
        """Yield what is in each image of a batch, by confidence, IoU and most detections."""
        confidence, iou, max_detections = thresholds
        raw = self._session.run(batch)
        kept = nms.non_max_suppression(
            raw.predictions, confidence, iou, max_det=max_detections, nc=len(self.names)
        )
        for number, (rows, shape) in enumerate(zip(kept, shapes, strict=True)):
            prototypes = None if raw.prototypes is None else raw.prototypes[number]
            yield _found(rows, prototypes, batch[number].shape[:2], shape, masks)

    def raw(self, image: NDArray[np.uint8]) -> Raw:
        """Return what the network says of one image, on the CPU and to keep."""
        raw = self._session.run([self._letterbox(image=image)])
        prototypes = None if raw.prototypes is None else raw.prototypes.cpu().clone()
        return Raw(raw.predictions.cpu().clone(), prototypes)

    def try_out(self) -> None:
        """Raise `ModelInvalidError` unless one picture goes through and comes out as numbers."""
        try:
            raw = self._session.run([np.zeros((_TRIAL_PX, _TRIAL_PX, 3), np.uint8)])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise ModelInvalidError(f"the model fails on a picture of {_TRIAL_PX} px: {error}") from error
        if not torch.isfinite(raw.predictions).all():
            raise ModelInvalidError("the model computes numbers that are not finite; its training diverged")
        coefficients = 0 if raw.prototypes is None else raw.prototypes.shape[1]
        if (told := raw.predictions.shape[1] - 4 - coefficients) != len(self.names):
            raise ModelInvalidError(
                f"the model tells {told} classes apart and names {len(self.names)}; "
                "upload the best.pt of a training, as it was written"
            )


def open_detector(path: Path, backend: Backend, *, imgsz: int | None, device: str) -> Detector:
    """Return the detector of the checkpoint at `path`, whose own image size is taken where `imgsz` is None.

    Nothing in the file runs. Raises `ModelInvalidError` for what is no YOLO11 detect or segment model.
    """
    ultralytics_env.require_safe_load()
    yolo, _, label_task = checkpoint.open_yolo11_of_any_task(path)
    detector = Detector(yolo, label_task, backend, imgsz=imgsz, device=device)
    detector.try_out()
    return detector


def own_imgsz(yolo: YOLO) -> int:
    """Return the edge that the model was trained at, in pixels, as a multiple of the stride."""
    imgsz = yolo.overrides.get("imgsz")
    edge = imgsz if isinstance(imgsz, int) and 0 < imgsz <= 4096 else DEFAULT_IMGSZ
    return -(-edge // STRIDE) * STRIDE


def _memory_bytes(yolo: YOLO, imgsz: int) -> int:
    """Estimate from what was measured: the weights twice, and of the layers' outputs what is largest first.

    A YOLO11n on OpenVINO in fp32 takes 85 MB at 640 px and 240 MB at 1280; torch and ONNX Runtime take less.
    """
    parameters: int = sum(parameter.numel() for parameter in yolo.model.parameters())
    first_channels = int(yolo.model.model[0].conv.out_channels)
    return 2 * 4 * parameters + 10 * first_channels * imgsz**2


def _found(
    rows: torch.Tensor,
    prototypes: torch.Tensor | None,
    boxed: tuple[int, int],
    shape: tuple[int, int],
    whole: bool,
) -> Found:
    """Turn rows of (box, score, class, mask coefficients) into what they say of an image of `shape`.

    What has a box but not one pixel of mask is left out, as Ultralytics does it: with `whole` by the masks
    of the image's size, else by those of the letterboxed image's.
    """
    masks = PackedMasks(shape) if whole and prototypes is not None else None
    letterboxed = rows[:, :4].clone()
    rows[:, :4] = ops.scale_boxes(boxed, rows[:, :4], shape)
    if prototypes is not None and len(rows):
        if masks is None:
            made = yolo_masks.of_letterboxed(prototypes, rows[:, 6:], letterboxed, boxed)
        else:
            made = yolo_masks.of_image(prototypes, rows[:, 6:], rows[:, :4], shape)
        kept = []
        for number, mask in enumerate(made):
            if mask.any():
                kept.append(number)
                if masks is not None:
                    masks.add(mask.bool().cpu().numpy())
        rows = rows[kept]
    rows = rows.cpu()
    return Found(
        boxes=rows[:, :4].numpy(),
        scores=rows[:, 4].numpy(),
        classes=rows[:, 5].long().numpy(),
        masks=masks,
    )
