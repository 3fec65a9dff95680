"""What SAM2 is trained to lessen: Meta's loss for the fine-tuning, per object, the same numbers for less work.

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
#: Weight of foreground in the focal loss; background has the rest.
_ALPHA = 0.25


class Losses(NamedTuple):
    """The parts for each of m objects, (m,) float32 each, not yet weighted."""

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

    Of several masks the one with the least loss is trained, and the one with the highest predicted IoU is shown:
    (m, 1, h, w), detached, for `sam2_prompts.correct`.
    """
    logits, predicted = decoded.logits, decoded.ious.to(_at_least_fp32(decoded.ious))
    focal, dice, actual = _MaskLoss.apply(logits.to(_at_least_fp32(logits)), masks)
    there = masks.flatten(1).any(1).to(focal.dtype)
    iou = (predicted - actual).abs().mean(1)
    scores = decoded.object_score[:, 0].to(_at_least_fp32(decoded.object_score))
    object_loss = functional.binary_cross_entropy_with_logits(
        scores, there.to(scores.dtype), reduction="none"
    )
    # Where there is no object, only the object score learns.
    parts = Losses(focal * there, dice * there, iou * there, object_loss)
    shown = decoded.ious.argmax(1)[:, None, None, None]
    return parts, logits.detach().take_along_dim(shown, 1)


class _MaskLoss(torch.autograd.Function):
    """(m, c, h, w) logits, (m, px, px) masks -> focal (m,) and dice (m,) of the best mask, IoU (m, c) of each.

    The derivatives are worked out on the way forward, one object at a time, and kept at the logits' own size: left
    to autograd, c masks at full resolution would be kept a dozen times over.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        objects = [_mask_loss(*pair) for pair in zip(logits, masks, strict=True)]
        focal, dice, iou, focal_slope, dice_slope = (torch.stack(part) for part in zip(*objects, strict=True))
        ctx.save_for_backward(focal_slope, dice_slope)
        ctx.mark_non_differentiable(iou)
        return focal, dice, iou

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, focal: Tensor, dice: Tensor, _: Tensor) -> tuple[Tensor, None]:
        focal_slope, dice_slope = ctx.saved_tensors
        return focal[:, None, None, None] * focal_slope + dice[:, None, None, None] * dice_slope, None


def _mask_loss(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the focal and dice loss of the best of (c, h, w) logits, the IoU of each, and both derivatives.

    With z, the logit of being wrong (-x within the mask, x outside), and s = sigmoid(z): the cross-entropy is
    softplus(z), and 1 - p_t of the focal loss is s.
    """
    mask_area = mask.sum()
    with torch.enable_grad():
        low = logits.detach()[None].requires_grad_()
        full = functional.interpolate(low, mask.shape, mode="bilinear", align_corners=False)[0]
    x = full.detach()
    sign = 1 - 2 * mask.to(x.dtype)
    alpha = (1 - _ALPHA) - (1 - 2 * _ALPHA) * mask.to(x.dtype)
    z = x * sign
    entropy, wrong = functional.softplus(z), torch.sigmoid(z)

    focal = (alpha * entropy * wrong.square()).mean((1, 2))
    missed = (wrong * mask).sum((1, 2))
    excess = wrong.sum((1, 2)) - missed
    # Areas as probabilities: twice the intersection, and both together.
    twice = 2 * (mask_area - missed) + 1
    both = excess + (mask_area - missed) + mask_area + 1
    dice = 1 - twice / both
    best = (_MASK_WEIGHT * focal + dice).argmin()[None]

    shown = x > 0
    intersection, union = (shown & mask).sum((1, 2)), (shown | mask).sum((1, 2))
    iou = intersection.to(x.dtype) / union.clamp(min=1).to(x.dtype)

    entropy, wrong = entropy[best], wrong[best]
    right = 1 - wrong
    focal_slope = alpha * sign * wrong.square() * (wrong + 2 * entropy * right) / mask.numel()
    dice_slope = (twice[best] - 2 * mask * both[best]) / both[best].square() * wrong * right
    slopes = []
    for slope in (focal_slope, dice_slope):
        whole = torch.zeros_like(full).index_copy_(0, best, slope)
        slopes.append(torch.autograd.grad(full, low, whole, retain_graph=True)[0][0])
    return focal[best][0], dice[best][0], iou, slopes[0], slopes[1]


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
