"""What SAM2 is asked while it is fine-tuned: boxes, points, and clicks where it erred.

As Meta trains it: `sample_box_points` and `sample_random_points_from_errors` of
`sam2/modeling/sam2_utils.py`, `_iter_correct_pt_sampling` of `training/model/sam2.py`; Kirillov et al.,
"Segment Anything", 2023, appendix A; Ravi et al., "SAM 2", 2024, appendix D.

All that is left to chance are numbers drawn before, a row for each object (`draw`). A row goes where its
object goes, so how objects are parted into chunks changes no prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rvmcv_worker.compute.sam2_network import Prompts

#: Columns of `draw` that the first prompt uses: box or point, a box's four sides, the pixel of a point.
#: Correction click i uses column FIRST + i.
FIRST = 6

#: A box's sides move by up to this share of its width or height, and by no more than the pixels at 1024.
_JITTER, _JITTER_PX, _AT_PX = 0.1, 20, 1024
#: Logits are held within these bounds as a mask prompt; `SAM2ImagePredictor` hands them back so clamped.
_LOGIT_LIMIT = 32.0


def draw(objects: int, clicks: int, generator: torch.Generator) -> Tensor:
    """Return (objects, FIRST + clicks) float64 within [0, 1), on the CPU: all that is left to chance."""
    return torch.rand(objects, FIRST + clicks, generator=generator, dtype=torch.float64)


def boxed(chances: Tensor, box_share: float) -> Tensor:
    """Tell which objects are prompted with a box first, (m,) bool; `chances` are rows of `draw`."""
    return chances[:, 0] < box_share


def boxes_of(masks: Tensor) -> Tensor:
    """Return the tight boxes of (m, h, w) bool masks, (m, 4) float32 x1 y1 x2 y2, right and bottom exclusive.

    The box of an empty mask is all zeros.
    """
    sides = []
    for axis in (-2, -1):
        touched = masks.view(torch.uint8).amax(axis)
        length = touched.shape[-1]
        first = touched.argmax(-1)
        last = length - touched.flip(-1).argmax(-1)
        sides.append((first, torch.where(touched.amax(-1) > 0, last, 0)))
    (left, right), (top, bottom) = sides
    return torch.stack((left, top, right, bottom), -1).float()


def first_prompts(masks: Tensor, chances: Tensor, *, box_share: float) -> tuple[Prompts, Tensor]:
    """Return a jittered box or a point within each mask, and which have a box, (m,) bool on the CPU.

    `masks`: (m, px, px) bool, none empty. `chances`: their rows of `draw`. Beside boxes a point is padded to
    two; where no object has a box it stands alone, as it does in inference.
    """
    is_box = boxed(chances, box_share)
    chances, on_device = chances.to(masks.device), is_box.to(masks.device)
    points = _pixels(masks, chances[:, 5])[:, None]
    kinds = torch.ones(len(masks), 1, dtype=torch.int32, device=masks.device)
    if bool(is_box.any()):
        corners = _jittered(boxes_of(masks), chances[:, 1:5], masks.shape[-1]).reshape(-1, 2, 2)
        points = torch.where(on_device[:, None, None], corners, functional.pad(points, (0, 0, 0, 1)))
        corner_kinds = torch.tensor((2, 3), dtype=torch.int32, device=masks.device)
        kinds = torch.where(on_device[:, None], corner_kinds, functional.pad(kinds, (0, 1), value=-1))
    return Prompts(points, kinds, None), is_box


def correct(prompts: Prompts, logits: Tensor, masks: Tensor, chance: Tensor) -> Prompts:
    """Return the prompts with one click more, where `logits` err, and with `logits` as mask prompt.

    `logits`: (m, 1, h, w), of the mask that a user would have been shown. `masks`: (m, px, px) bool.
    `chance`: (m,), a column of `draw`. A click on what was missed is foreground (1), on what was too much
    background (0). Where nothing is wrong it is background, anywhere outside the mask, as Meta does it; a
    mask that is the whole image has no outside and is clicked inside.
    """
    logits = logits.detach().float()
    shown = functional.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0] > 0
    wrong = shown ^ masks
    right = ~wrong.flatten(1).any(1)
    if bool(right.any()):
        outside = ~masks[right]
        outside |= ~outside.flatten(1).any(1)[:, None, None]
        wrong[right] = outside
    click = _pixels(wrong, chance.to(masks.device))
    x, y = click.long().unbind(-1)
    kind = masks[torch.arange(len(masks), device=masks.device), y, x].int()
    return Prompts(
        torch.cat((prompts.points, click[:, None]), 1),
        torch.cat((prompts.kinds, kind[:, None]), 1),
        logits.clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT),
    )


def _jittered(boxes: Tensor, chances: Tensor, image_px: int) -> Tensor:
    """Move each side of (m, 4) boxes by chance, (m, 4); none leaves the image."""
    sizes = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    reach = (_JITTER * sizes).clamp(max=_JITTER_PX * image_px / _AT_PX)
    return (boxes + (2 * chances.float() - 1) * reach).clamp(0, image_px)


def _pixels(regions: Tensor, chances: Tensor) -> Tensor:
    """Return a pixel of each (m, h, w) bool region, each as likely as any other: (m, 2) float32 x, y.

    The n-th pixel is found by counting: one number decides, where noise for every pixel would take millions.
    """
    every = torch.arange(len(regions), device=regions.device)
    up_to = regions.view(torch.uint8).sum(-2, dtype=torch.int32).cumsum(-1)
    count = up_to[:, -1]
    # Below 1 as a chance is, its product with the count can round up to the count.
    rank = torch.minimum((chances * count).long(), count - 1)[:, None]
    x = torch.searchsorted(up_to, rank, right=True)
    before = functional.pad(up_to, (1, 0)).gather(1, x)
    column = regions[every, :, x[:, 0]].cumsum(-1)
    y = torch.searchsorted(column, rank - before, right=True)
    return torch.cat((x, y), 1).float()
