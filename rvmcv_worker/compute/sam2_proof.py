"""The proof that a fine-tuning helped: what a model, as it is served, says of a split, and how true that is.

Base model, every epoch and the active model are measured by the same code on the same objects.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rvmcv_worker.compute import mask_metrics, sam2_square, segmenter
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Features, Network, Prompts
from rvmcv_worker.compute.sam2_samples import UPRIGHT, Samples
from rvmcv_worker.compute.sam2_score import Fit, Score
from rvmcv_worker.errors import ModelInvalidError

if TYPE_CHECKING:
    from rvmcv_worker.compute.sam2_embeddings import Embeddings

#: Masks are measured at the image's own size, but with no longer side than this.
MAX_SIDE_PX = 1024

T = TypeVar("T")
_Mask = NDArray[np.bool_]


class Proof:
    """A split, measured again and again; it holds one image and the masks of a few objects at a time.

    Objects that `samples` leaves out are left out for all models, whatever their `image_px`. `cache` has the
    frozen output of the models that are measured; without it an image is encoded each time. `tick` is told
    after each image how many are done, and of how many.
    """

    def __init__(
        self,
        samples: Samples,
        cache: Embeddings | None,
        names: list[str],
        memory: Memory,
        check_stop: Callable[[], None],
        tick: Callable[[int, int], None],
    ) -> None:
        self._samples = samples
        self._cache = cache
        self._names = names
        self._memory = memory
        self._check_stop = check_stop
        self._tick = tick

    def measure(self, network: Network) -> Score:
        """Return what a model is worth; it is left in evaluation mode.

        Raises `ModelInvalidError` for masks that are not finite, and `OutOfGpuMemoryError`.
        """
        fits = []
        for index in range(len(self._samples)):
            fits.append(self._of_image(network, index, _fits))
            self._tick(index + 1, len(self._samples))
        return self._score(fits)

    def box_as_mask(self) -> Score:
        """Return what the ground truth's box is worth as a mask: what any model has to beat."""
        fits = []
        for index in range(len(self._samples)):
            self._check_stop()
            size = self._size(index)
            truths = (found.mask(*size) for found in self._samples.objects(index))
            fits.append([_fit(truth, _filled_box(truth), None) for truth in truths])
        return self._score(fits)

    def masks(self, network: Network, index: int) -> list[_Mask]:
        """Return the masks of an image's objects with their boxes, at the size that is measured at."""
        return self._of_image(network, index, _Few.with_boxes)

    @torch.no_grad()  # not inference mode: what the cache keeps of it has to be fit for a backward pass
    def _of_image(self, network: Network, index: int, of: Callable[[_Few], list[T]]) -> list[T]:
        """Return what `of` says of each object, of as many at once as the memory holds."""
        network.eval()
        self._check_stop()
        objects, size = self._samples.objects(index), self._size(index)
        features = self._memory.attempt(partial(self._features, network, index), decodes=False)

        def some(first: int) -> list[T]:
            few = objects[first : first + self._memory.objects_at_once]
            return of(_Few(network, features, [found.mask(*size) for found in few]))

        said: list[T] = []
        while len(said) < len(objects):
            self._check_stop()
            said += self._memory.attempt(partial(some, len(said)))
        return said

    def _features(self, network: Network, index: int) -> Features:
        if self._cache is not None:
            return network.features([output[None] for output in self._cache.get(index, UPRIGHT)])
        square = sam2_square.square(self._samples.image(index), network.image_px, network.device)
        return network.features(network.frozen(square[None]))

    def _size(self, index: int) -> tuple[int, int]:
        """Return height and width that an image is measured at."""
        labelled = self._samples.labelled(index)
        scale = min(1.0, MAX_SIDE_PX / max(labelled.height, labelled.width))
        return max(1, round(labelled.height * scale)), max(1, round(labelled.width * scale))

    def _score(self, fits: list[list[Fit | None]]) -> Score:
        """Return the means, of what each image's objects are worth."""
        classes = [[found.class_id for found in self._samples.objects(index)] for index in range(len(fits))]
        return Score.of(fits, classes, self._names, self._samples.tiny_objects)


class _Few(NamedTuple):
    """A few objects of an image. For one whose mask is empty a model is asked all the same, in vain."""

    network: Network
    #: Of that image alone.
    features: Features
    truths: list[_Mask]

    def with_boxes(self) -> list[_Mask]:
        """Return the masks for the tight boxes, to the pixel what `Segmenter` says in fp32."""
        corners = self._on_device([mask_metrics.box_of(truth) for truth in self.truths])
        return self._answers(self._in_square(corners.reshape(-1, 2, 2)), (2, 3), multimask=False)

    def with_clicks(self) -> list[_Mask]:
        """Return the masks for a click on each deepest pixel: of three the one that the model rates best."""
        pixels = self._on_device([mask_metrics.deepest(truth) for truth in self.truths])
        # The middle of the pixel, less the half of one of the square's pixels that SAM2 itself adds.
        middles = self._in_square(pixels.reshape(-1, 1, 2) + 0.5) - 0.5
        return self._answers(middles, (1,), multimask=True)

    def _on_device(self, pixels: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor(pixels, dtype=torch.float32, device=self.network.device)

    def _in_square(self, points: torch.Tensor) -> torch.Tensor:
        height, width = self.truths[0].shape
        return points / torch.tensor((width, height), device=points.device) * self.network.image_px

    def _answers(self, points: torch.Tensor, kinds: tuple[int, ...], *, multimask: bool) -> list[_Mask]:
        count = len(self.truths)
        told = torch.tensor(kinds, dtype=torch.int32, device=points.device).expand(count, -1)
        first = torch.zeros(count, dtype=torch.int64, device=points.device)
        decoded = self.network.decode(self.features, first, Prompts(points, told), multimask=multimask)
        if not bool(decoded.logits.isfinite().all() and decoded.ious.isfinite().all()):
            raise ModelInvalidError("the model makes masks that are no finite numbers; use another one")
        best = decoded.logits[torch.arange(count), decoded.ious.argmax(-1)]
        return [segmenter.at_full_size(logits, self.truths[0].shape) for logits in best]


def _fits(few: _Few) -> list[Fit | None]:
    """Return what a model's masks of a few objects are worth."""
    return [
        _fit(truth, with_box, with_click)
        for truth, with_box, with_click in zip(few.truths, few.with_boxes(), few.with_clicks(), strict=True)
    ]


def _fit(truth: _Mask, with_box: _Mask, with_click: _Mask | None) -> Fit | None:
    """Return what masks are worth; None where an object has no pixel at the size that is measured at."""
    if not truth.any():
        return None
    return Fit(
        iou=mask_metrics.iou(with_box, truth),
        iou_click=None if with_click is None else mask_metrics.iou(with_click, truth),
        boundary_f=mask_metrics.boundary_f(with_box, truth),
    )


def _filled_box(truth: _Mask) -> _Mask:
    left, top, right, bottom = mask_metrics.box_of(truth)
    box = np.zeros_like(truth)
    box[top:bottom, left:right] = True
    return box
