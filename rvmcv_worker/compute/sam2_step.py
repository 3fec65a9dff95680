"""One step of the optimizer, in as many parts as the memory needs.

A step's gradient is a sum over its objects and their rounds of prompts, and so it can be gathered from a few
images and a few objects at a time, round by round: no part needs another's activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from rvmcv_worker.compute import sam2_loss, sam2_prompts
from rvmcv_worker.compute.sam2_loss import Losses
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Features, Network
from rvmcv_worker.compute.sam2_samples import Batch
from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.sam2_options import Sam2Options


class Step:
    """What every step of a training has in common."""

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.AdamW,
        options: Sam2Options,
        memory: Memory,
        check_stop: Callable[[], None],
    ) -> None:
        """`check_stop` raises where the job is to end; it is asked between a few objects and the next."""
        self._network = network
        self._parameters = list(network.trained_parameters().values())
        self._optimizer = optimizer
        self._options = options
        self._memory = memory
        self._check_stop = check_stop

    def run(self, batch: Batch, seed: tuple[int, int, int], lr_factor: float) -> dict[str, float]:
        """Take a step and return its losses, means over the objects: total, mask, dice, iou, object.

        `seed`: (seed, epoch, position in it), alone decides on the prompts. Raises `InvalidJobError` where
        the losses or their gradient are no longer finite, and `OutOfGpuMemoryError`; no parameter has been
        changed then.
        """
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        )
        chances = sam2_prompts.draw(len(batch.masks), self._options.clicks, generator)
        return self._memory.attempt(lambda: self._whole_step(batch, chances, lr_factor))

    def _whole_step(self, batch: Batch, chances: Tensor, lr_factor: float) -> dict[str, float]:
        self._network.train()
        self._optimizer.zero_grad()
        losses = torch.stack(list(self._gather(batch, chances))).sum(0) / len(batch.masks)
        total, *parts = losses.tolist()
        _refuse_diverged("loss", total)
        norm = clip_grad_norm_(self._parameters, self._options.clip_norm)
        _refuse_diverged("norm of the gradient", float(norm))
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        self._optimizer.step()
        return dict(zip(Losses._fields, parts, strict=True), total=total)

    def _gather(self, batch: Batch, chances: Tensor) -> Iterator[Tensor]:
        """Add a batch's gradient to the parameters', a few images at a time; yield sums of losses, (5,)."""
        images, image_of = len(batch.frozen[0]), batch.image_of.cpu()
        is_box = sam2_prompts.boxed(chances, self._options.box_share)
        for start in range(0, images, self._memory.images_at_once):
            few = slice(start, start + self._memory.images_at_once)
            features = self._network.features([each[few] for each in batch.frozen])
            # Decoding begins at leaves: they gather the gradient that then goes once through the encoder.
            leaves = Features(*(each.detach().requires_grad_(each.requires_grad) for each in features))
            of_these = (image_of >= few.start) & (image_of < few.stop)
            for kind in (is_box, ~is_box):
                chosen = torch.nonzero(of_these & kind)[:, 0]
                for first in range(0, len(chosen), self._memory.objects_at_once):
                    chunk = chosen[first : first + self._memory.objects_at_once]
                    self._check_stop()
                    masks = batch.masks[chunk].to(self._network.device)
                    for losses in self._rounds(leaves, image_of[chunk] - start, masks, chances[chunk]):
                        torch.autograd.backward(losses[0] / len(batch.masks))
                        yield losses.detach()
            encoded = [pair for pair in zip(features, leaves, strict=True) if pair[1].grad is not None]
            if encoded:
                torch.autograd.backward(
                    [feature for feature, _ in encoded], [leaf.grad for _, leaf in encoded]
                )

    def _rounds(
        self, features: Features, image_of: Tensor, masks: Tensor, chances: Tensor
    ) -> Iterator[Tensor]:
        """Prompt objects and correct them; yield each round's losses, sums over the objects, (5,).

        All of the objects are boxed, or none. In Meta's training a round's gradient goes on through the mask
        that is the next one's prompt; here it ends there, and so only one round is in memory.
        """
        prompts, is_box = sam2_prompts.first_prompts(masks, chances, box_share=self._options.box_share)
        # Only a single point is ambiguous, and has three masks.
        multimask = not bool(is_box.any())
        for click in range(self._options.clicks + 1):
            decoded = self._network.decode(features, image_of, prompts, multimask=multimask)
            losses, shown = sam2_loss.losses(decoded, masks)
            yield torch.stack((losses.total, *losses)).sum(1)
            if click < self._options.clicks:
                multimask = False
                prompts = sam2_prompts.correct(prompts, shown, masks, chances[:, sam2_prompts.FIRST + click])


def _refuse_diverged(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise InvalidJobError(f"the training diverged ({what} {value}); use a smaller lr0")
