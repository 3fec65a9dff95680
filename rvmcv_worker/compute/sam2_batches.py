"""The batches of an epoch: which images in which order, how mirrored, with which of their objects.

All of it follows from (seed, epoch) alone: a training that goes on at an epoch sees what one in a piece sees.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from rvmcv_worker.compute.sam2_embeddings import Embeddings, Key, Loaded
from rvmcv_worker.compute.sam2_samples import UPRIGHT, Batch, Flip, Samples
from rvmcv_worker.in_order import in_order
from rvmcv_worker.sam2_options import Sam2Options

#: What is drawn for an epoch, each from a generator of its own.
_ORDER, _FLIPS, _OBJECTS = range(3)
#: Epochs that are looked through for what they ask for; a later one asks for hardly anything else.
_LOOKED_THROUGH = 64


@dataclass(frozen=True)
class _Part:
    """A batch as far as it can be made without the network."""

    keys: list[Key]
    loaded: Loaded
    masks: torch.Tensor
    image_of: torch.Tensor


def batches(
    samples: Samples, embeddings: Embeddings, options: Sam2Options, epoch: int, *, threads: int | None = None
) -> Generator[Batch, None, None]:
    """Yield an epoch's batches, `options.batch` images each, the last of them maybe with fewer.

    `threads` make the next ones meanwhile; unless told, one does where the network is on a GPU: on the CPU
    it would take the network's own time. Close this (`contextlib.closing`) when it is left early.
    """
    device = embeddings.network.device
    if threads is None:
        threads = 1 if device.type == "cuda" else 0
    order = _generator(options, epoch, _ORDER).permutation(len(samples)).tolist()
    flips = _flips(len(samples), options, epoch)
    chosen = [order[start : start + options.batch] for start in range(0, len(order), options.batch)]

    def make(indices: list[int]) -> _Part:
        return _make(samples, embeddings, options, epoch, [(index, flips[index]) for index in indices])

    made = in_order(make, chosen, threads=threads) if threads else (make(indices) for indices in chosen)
    with contextlib.closing(made):
        for part in made:
            frozen = embeddings.finish(part.keys, part.loaded)
            masks = part.masks.to(device, non_blocking=True)
            yield Batch(frozen, masks, part.image_of.to(device))


def wanted_upright(samples: Samples) -> list[Key]:
    """Return what a split is asked for that is only measured on."""
    return [(index, UPRIGHT) for index in range(len(samples))]


def wanted_in_training(samples: Samples, options: Sam2Options, epochs: Iterable[int]) -> list[Key]:
    """Return what the batches of `epochs` are asked for, what is asked for most often first."""
    uses: Counter[Key] = Counter()
    for epoch in islice(epochs, _LOOKED_THROUGH):
        uses.update(enumerate(_flips(len(samples), options, epoch)))
    return sorted(uses, key=lambda key: (-uses[key], key))


def _make(
    samples: Samples, embeddings: Embeddings, options: Sam2Options, epoch: int, keys: list[Key]
) -> _Part:
    masks, counts = [], []
    for index, flip in keys:
        chosen = _objects(len(samples.objects(index)), index, options, epoch)
        masks.append(samples.masks(index, chosen, flip))
        counts.append(len(chosen))
    together = torch.cat(masks)
    if embeddings.network.device.type == "cuda":
        together = together.pin_memory()
    image_of = torch.repeat_interleave(torch.arange(len(keys)), torch.tensor(counts))
    return _Part(keys, embeddings.load(keys), together, image_of)


def _flips(count: int, options: Sam2Options, epoch: int) -> list[Flip]:
    """Return how each image is mirrored in an epoch."""
    draws = _generator(options, epoch, _FLIPS).random((count, 2))
    return [Flip(*mirrored) for mirrored in (draws < (options.fliplr, options.flipud)).tolist()]


def _objects(count: int, index: int, options: Sam2Options, epoch: int) -> list[int]:
    """Return which of an image's `count` objects have their turn in an epoch, in rising order."""
    if count <= options.objects:
        return list(range(count))
    dice = _generator(options, epoch, _OBJECTS, index)
    return sorted(dice.choice(count, options.objects, replace=False).tolist())


def _generator(options: Sam2Options, epoch: int, *what: int) -> np.random.Generator:
    return np.random.default_rng((options.seed, epoch, *what))
