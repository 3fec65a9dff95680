"""The loss of SAM2's fine-tuning against Meta's own code."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional

from rvmcv_worker.compute.sam2_loss import losses
from rvmcv_worker.compute.sam2_network import Decoded

PX, EDGE = 64, 16


@pytest.fixture
def meta(monkeypatch):
    """Meta's loss as its fine-tuning config sets it, with as little of the rest as it imports."""
    trainer, distributed = ModuleType("training.trainer"), ModuleType("training.utils.distributed")
    trainer.CORE_LOSS_KEY = "core_loss"
    distributed.get_world_size = lambda: 1
    distributed.is_dist_avail_and_initialized = lambda: False
    for module in (ModuleType("training"), trainer, ModuleType("training.utils"), distributed):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    path = Path(sysconfig.get_paths()["purelib"]) / "training" / "loss_fns.py"
    spec = importlib.util.spec_from_file_location("training.loss_fns", path)
    loss_fns: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loss_fns)
    return loss_fns.MultiStepMultiMasksAndIous(
        weight_dict={"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1},
        supervise_all_iou=True,
        iou_use_l1_loss=True,
        pred_obj_scores=True,
        focal_gamma_obj_score=0.0,
        focal_alpha_obj_score=-1.0,
    )


def masks(count: int) -> torch.Tensor:
    """Discs of different sizes."""
    y, x = torch.meshgrid(torch.arange(PX), torch.arange(PX), indexing="ij")
    return torch.stack([(x - 20 - 3 * i) ** 2 + (y - 30) ** 2 < (4 + 2 * i) ** 2 for i in range(count)])


def decoded(count: int, masks_out: int, *, scale: float = 5, dtype: torch.dtype = torch.float32) -> Decoded:
    generator = torch.Generator().manual_seed(count + masks_out)
    random = {"generator": generator, "dtype": dtype}
    return Decoded(
        (scale * torch.randn(count, masks_out, EDGE, EDGE, **random)).requires_grad_(),
        torch.rand(count, masks_out, **random).requires_grad_(),
        torch.randn(count, 1, **random).requires_grad_(),
    )


def whole(answer: Decoded) -> torch.Tensor:
    return functional.interpolate(answer.logits, (PX, PX), mode="bilinear", align_corners=False)


# Logits of a hundred are beyond where an exponential would overflow or a logarithm see a zero.
@pytest.mark.parametrize("scale", [0.1, 5, 100])
@pytest.mark.parametrize("masks_out", [1, 3])
def test_every_part_and_the_gradient_are_metas(meta, masks_out, scale):
    truth = masks(7)
    truth[2] = False  # one object that is not in the image
    ours, theirs = (decoded(7, masks_out, scale=scale) for _ in range(2))

    parts, _ = losses(ours, truth)
    mean = parts.total.mean()
    mean.backward()
    outputs = {
        "multistep_pred_multimasks_high_res": [whole(theirs)],
        "multistep_pred_ious": [theirs.ious],
        "multistep_object_score_logits": [theirs.object_score],
    }
    expected = meta([outputs], truth[None])
    expected["core_loss"].backward()

    torch.testing.assert_close(mean, expected["core_loss"], rtol=1e-5, atol=1e-6)
    for part, name in zip(parts, ("loss_mask", "loss_dice", "loss_iou", "loss_class"), strict=True):
        torch.testing.assert_close(part.mean(), expected[name], rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert other.grad.abs().max() > 1e-5 or scale == 100
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("masks_out", [1, 3])
def test_the_gradient_is_that_of_the_numbers(masks_out):
    truth = functional.max_pool2d(masks(2).float()[:, None], 4)[:, 0] > 0
    logits, ious, score = decoded(2, masks_out, scale=2, dtype=torch.float64)
    logits = logits[..., ::4, ::4].detach().requires_grad_()

    def parts(*answer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        each, _ = losses(Decoded(*answer), truth)
        return (*each, each.total)

    assert torch.autograd.gradcheck(parts, (logits, ious, score))


def test_the_mask_shown_is_the_one_that_the_model_thinks_best():
    answer = decoded(5, 3)
    _, shown = losses(answer, masks(5))
    assert not shown.requires_grad
    for each, logits, ious in zip(shown, answer.logits, answer.ious, strict=True):
        assert torch.equal(each[0], logits[ious.argmax()])


def test_an_object_has_the_same_loss_and_gradient_alone_as_among_others():
    truth, together = masks(4), decoded(4, 3)
    parts, _ = losses(together, truth)
    parts.total.sum().backward()
    for index in range(4):
        alone = Decoded(*(each[index : index + 1].detach().requires_grad_() for each in together))
        part, _ = losses(alone, truth[index : index + 1])
        part.total.sum().backward()
        assert torch.equal(part.mask[0], parts.mask[index])
        assert torch.equal(alone.logits.grad[0], together.logits.grad[index])
