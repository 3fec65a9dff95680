"""Prompts of SAM2's fine-tuning."""

from __future__ import annotations

import pytest
import torch
from sam2.modeling.sam2_utils import sample_random_points_from_errors

from rvmcv_worker.compute import sam2_prompts
from rvmcv_worker.compute.sam2_network import Prompts

PX = 64


def discs(count: int, px: int = PX) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(px), torch.arange(px), indexing="ij")
    return torch.stack(
        [(x - px // 3 - 3 * i) ** 2 + (y - px // 2) ** 2 < (px // 12 + i) ** 2 for i in range(count)]
    )


def chances(count: int, clicks: int = 2) -> torch.Tensor:
    return sam2_prompts.draw(count, clicks, torch.Generator().manual_seed(5))


def logits_of(masks: torch.Tensor) -> torch.Tensor:
    """Logits at the masks' own size that show exactly them."""
    return (masks[:, None].float() - 0.5) * 100


def no_prompts(count: int) -> Prompts:
    return Prompts(torch.empty(count, 0, 2), torch.empty(count, 0, dtype=torch.int32), None)


def test_a_box_is_tight_and_ends_behind_the_last_pixel():
    masks = torch.zeros(4, PX, PX, dtype=torch.bool)
    masks[0, 3:9, 5:20] = True
    masks[1, 63, 0] = True
    masks[2] = True
    assert sam2_prompts.boxes_of(masks).tolist() == [[5, 3, 20, 9], [0, 63, 1, 64], [0, 0, 64, 64], [0] * 4]


@pytest.mark.parametrize(("px", "side_px", "reach_px"), [(64, 10, 1.0), (64, 40, 1.25), (1024, 800, 20.0)])
def test_a_box_is_jittered_by_a_tenth_of_its_sides_but_no_more_than_20_px_at_1024(px, side_px, reach_px):
    start = px // 8
    masks = torch.zeros(1, px, px, dtype=torch.bool)
    masks[0, start : start + side_px, start : start + side_px] = True
    farthest = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0, 0.5]], dtype=torch.float64)
    prompts, is_box = sam2_prompts.first_prompts(masks, farthest, box_share=1)
    assert is_box.tolist() == [True]
    assert prompts.kinds.tolist() == [[2, 3]]
    (left, top), (right, bottom) = prompts.points[0].tolist()
    assert (left, top) == pytest.approx((start - reach_px, start + reach_px))
    assert (right, bottom) == pytest.approx((start + side_px + reach_px, start + side_px - reach_px))


def test_a_jittered_box_stays_within_the_image():
    masks = torch.ones(200, PX, PX, dtype=torch.bool)
    prompts, _ = sam2_prompts.first_prompts(masks, chances(200), box_share=1)
    assert prompts.points.min() == 0
    assert prompts.points.max() == PX
    assert ((prompts.points > 0) & (prompts.points < PX)).any()


def test_every_pixel_of_a_mask_is_as_likely_to_be_the_point():
    mask = discs(1)
    area = int(mask.sum())
    drawn = torch.zeros(area, sam2_prompts.FIRST, dtype=torch.float64)
    drawn[:, 5] = (torch.arange(area) + 0.5) / area
    prompts, _ = sam2_prompts.first_prompts(mask.expand(area, -1, -1), drawn, box_share=0)
    assert prompts.points.shape == (area, 1, 2)
    assert (prompts.kinds == 1).all()
    assert {(x, y) for ((x, y),) in prompts.points.int().tolist()} == {
        (x, y) for y, x in torch.nonzero(mask[0]).tolist()
    }


def test_the_last_chance_below_one_is_a_pixel_too():
    drawn = torch.full((1, sam2_prompts.FIRST), 1 - 2**-53, dtype=torch.float64)
    prompts, _ = sam2_prompts.first_prompts(torch.ones(1, 1024, 1024).bool(), drawn, box_share=0)
    assert prompts.points.tolist() == [[[1023, 1023]]]


def test_boxes_and_points_are_mixed_by_share_and_padded_to_one_length():
    masks, drawn = discs(8), chances(8)
    prompts, is_box = sam2_prompts.first_prompts(masks, drawn, box_share=0.5)
    assert torch.equal(is_box, sam2_prompts.boxed(drawn, 0.5))
    assert is_box.any()
    assert not is_box.all()
    assert prompts.kinds[is_box].unique(dim=0).tolist() == [[2, 3]]
    assert prompts.kinds[~is_box].unique(dim=0).tolist() == [[1, -1]]
    many = sam2_prompts.boxed(chances(4000), 0.25).float().mean()
    assert many == pytest.approx(0.25, abs=0.03)


def test_chunks_change_no_prompt():
    masks, drawn = discs(9), chances(9)
    for box_share in (0, 1):
        together, _ = sam2_prompts.first_prompts(masks, drawn, box_share=box_share)
        shown = torch.randn(9, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        corrected = sam2_prompts.correct(together, shown, masks, drawn[:, sam2_prompts.FIRST])
        for few in torch.arange(9).split(2):
            apart, _ = sam2_prompts.first_prompts(masks[few], drawn[few], box_share=box_share)
            apart = sam2_prompts.correct(apart, shown[few], masks[few], drawn[few, sam2_prompts.FIRST])
            for one, other in zip(apart, corrected, strict=True):
                assert torch.equal(one, other[few])


@pytest.mark.parametrize("case", ["missed and too much", "only missed", "only too much", "nothing wrong"])
def test_a_click_may_land_where_metas_may(case):
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:5, 2:6] = True
    shown = {
        "missed and too much": mask.roll(1, 2),
        "only missed": mask & (torch.arange(8) != 3),
        "only too much": mask | (torch.arange(8)[:, None] == 4),
        "nothing wrong": mask.clone(),
    }[case]
    count = 640  # a multiple of no error's area, and many to each pixel
    drawn = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    every = mask.expand(count, -1, -1)
    ours = sam2_prompts.correct(no_prompts(count), logits_of(shown.expand(count, -1, -1)), every, drawn)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs, kinds = sample_random_points_from_errors(mask[:, None], shown[:, None], num_pt=count)
    assert _clicks(ours.points[:, 0], ours.kinds[:, 0]) == _clicks(theirs[0], kinds[0])


def _clicks(points: torch.Tensor, kinds: torch.Tensor) -> set[tuple[int, int, int]]:
    return {
        (*point, kind) for point, kind in zip(map(tuple, points.int().tolist()), kinds.tolist(), strict=True)
    }


def test_a_whole_image_without_error_is_clicked_inside():
    masks = torch.ones(2, 8, 8, dtype=torch.bool)
    prompts = sam2_prompts.correct(no_prompts(2), logits_of(masks), masks, torch.tensor([0.0, 0.99]))
    assert prompts.kinds.tolist() == [[1], [1]]


def test_errors_are_those_of_the_mask_at_full_size():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, :, :8] = True
    # Between the second and the third column of four the logit crosses zero: just where the mask ends.
    shown = torch.tensor([3.0, 3.0, -3.0, -3.0]).expand(1, 1, 4, 4)
    prompts = sam2_prompts.correct(no_prompts(1), shown, mask, torch.tensor([0.5]))
    assert prompts.kinds.tolist() == [[0]]  # nothing was wrong


def test_logits_come_back_bounded_without_a_gradient_beside_all_clicks():
    masks, drawn = discs(3), chances(3)
    logits = (50 * torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))).requires_grad_()
    first, _ = sam2_prompts.first_prompts(masks, drawn, box_share=1)
    once = sam2_prompts.correct(first, logits, masks, drawn[:, sam2_prompts.FIRST])
    twice = sam2_prompts.correct(once, logits / 2, masks, drawn[:, sam2_prompts.FIRST + 1])
    assert torch.equal(once.logits, logits.detach().clamp(-32, 32))
    assert torch.equal(twice.logits, (logits.detach() / 2).clamp(-32, 32))
    assert not twice.logits.requires_grad
    assert twice.points.shape == (3, 4, 2)
    assert torch.equal(twice.points[:, :3], once.points)
    assert twice.kinds.dtype == torch.int32
    assert twice.kinds[:, :2].tolist() == [[2, 3]] * 3
