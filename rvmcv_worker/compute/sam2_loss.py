"""What SAM2 is trained to lessen: Meta's loss for a fine-tuning, per object, the same numbers for less work.

Meta's: `MultiStepMultiMasksAndIous` of `training/loss_fns.py`, weighted as in
`configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml`. Focal: Lin et al., "Focal Loss for Dense Object
Detection", 2017. Dice: Milletari et al., "V-Net", 2016.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rvmcv_worker.compute.sam2_network import Decoded

#: Weight of the focal loss in the sum; dice, IoU and object score have 1.
_MASK_WEIGHT = 20
#: Weight of the foreground in the focal loss; the background has the rest.
_ALPHA = 0.25


class Losses(NamedTuple):
    """The parts for each of m objects, (m,) each, not yet weighted."""

    #: Focal loss of the best mask, a mean over the square's pixels.
    mask: Tensor
    #: Dice loss of the best mask.
    dice: Tensor
    #: How far the predicted IoU is off, a mean over the masks put out.
    iou: Tensor
    #: Binary cross-entropy of the object score.
    object: Tensor

    @property
    def total(self) -> Tensor:
        """The weighted sum, (m,)."""
        return _MASK_WEIGHT * self.mask + self.dice + self.iou + self.object


def losses(decoded: Decoded, masks: Tensor) -> tuple[Losses, Tensor]:
    """Return the losses against (m, px, px) bool masks, and the logits that a user would have been shown.

    Of several masks the one with the least loss is trained; shown is the one with the highest predicted IoU:
    (m, 1, h, w), detached, for `sam2_prompts.correct`.
    """
    focal, dice, actual = _MaskLoss.apply(decoded.logits, masks)
    there = masks.flatten(1).any(1).to(focal.dtype)
    iou = (decoded.ious - actual).abs().mean(1)
    presence = functional.binary_cross_entropy_with_logits(
        decoded.object_score[:, 0], there, reduction="none"
    )
    # Where there is no object, only its score is to learn.
    parts = Losses(focal * there, dice * there, iou * there, presence)
    shown = decoded.ious.argmax(1)[:, None, None, None]
    return parts, decoded.logits.detach().take_along_dim(shown, 1)


class _MaskLoss(torch.autograd.Function):
    """(m, c, h, w) logits, (m, px, px) masks -> focal and dice (m,) of the best mask, IoU (m, c) of each.

    The derivatives are worked out on the way forward, one object at a time, and kept at the logits' own size:
    left to autograd, all c masks would be kept at full resolution a dozen times over.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        objects = [_mask_loss(*pair) for pair in zip(logits, masks, strict=True)]
        focal, dice, iou, best, slopes = (torch.stack(part) for part in zip(*objects, strict=True))
        ctx.save_for_backward(best, slopes)
        ctx.masks_out = logits.shape[1]
        ctx.mark_non_differentiable(iou)
        return focal, dice, iou

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, focal: Tensor, dice: Tensor, _: Tensor) -> tuple[Tensor, None]:
        best, slopes = ctx.saved_tensors
        of_best = (torch.stack((focal, dice), 1)[:, :, None, None] * slopes).sum(1, keepdim=True)
        only_best = functional.one_hot(best, ctx.masks_out)[:, :, None, None]
        return of_best * only_best, None


def _mask_loss(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return focal and dice of the best of (c, h, w) logits, the IoU (c,) of each, which is best, and slopes.

    The slopes, (2, h, w), are the derivatives of focal and dice. With z the logit of a pixel being wrong (-x
    within the mask, x outside) and s = sigmoid(z), cross-entropy is softplus(z), and 1 - p_t of focal loss is
    s. Worked in place: the time goes into memory.
    """
    x = functional.interpolate(logits[None], mask.shape, mode="bilinear", align_corners=False)[0]
    target = mask.to(x.dtype)
    area = target.sum()
    positive = (x > 0).to(x.dtype)
    both_areas = area + _sum(positive)
    shared = _sum(positive.mul_(target))
    iou = shared / (both_areas - shared).clamp(min=1)

    z = x.mul_(1 - 2 * target)
    entropy = functional.softplus(z)
    wrong = z.sigmoid_()
    modulated = wrong.square().mul_(entropy)
    focal = (1 - _ALPHA) * _sum(modulated) - (1 - 2 * _ALPHA) * _sum(modulated.mul_(target))
    focal /= mask.numel()
    missed = _sum(torch.mul(wrong, target, out=modulated))
    # Dice is 1 - above / below, where areas are sums of probabilities.
    above = 2 * (area - missed) + 1
    below = 2 * (area - missed) + _sum(wrong) + 1
    dice = 1 - above / below

    best = (_MASK_WEIGHT * focal + dice).argmin()[None]
    focal, dice, above, below, entropy, wrong = (
        part.index_select(0, best) for part in (focal, dice, above, below, entropy, wrong)
    )
    right = 1 - wrong
    focal_slope = entropy.mul_(right).mul_(2).add_(wrong).mul_(wrong).mul_(wrong)
    focal_slope *= ((1 - _ALPHA) - target) / mask.numel()  # the sign is that of z to x
    dice_slope = wrong.mul_(right).mul_((above - 2 * below * target) / below.square())
    slopes: Tensor = torch.ops.aten.upsample_bilinear2d_backward(
        torch.stack((focal_slope, dice_slope), 1), mask.shape, (1, 2, *logits.shape[1:]), False, None, None
    )
    return focal[0], dice[0], iou, best[0], slopes[0]


def _sum(maps: Tensor) -> Tensor:
    return maps.sum((1, 2))
