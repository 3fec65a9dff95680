"""Which parameter of SAM2 learns at which rate, and how that changes over a training."""

from __future__ import annotations

import pytest
import torch
from sam2.modeling.sam2_base import SAM2Base

from rvmcv_worker.compute import sam2_checkpoint
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.compute.sam2_optimizer import learning_rate, optimizer
from rvmcv_worker.sam2_options import Sam2Options, Trained

CPU = torch.device("cpu")
LR = 1e-4


@pytest.fixture(scope="module")
def model() -> SAM2Base:
    return sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=64)


def _by_name(network: Network, adamw: torch.optim.AdamW) -> dict[str, tuple[float, float]]:
    """Return name -> (learning rate, weight decay)."""
    names = {id(parameter): name for name, parameter in network.trained_parameters().items()}
    return {
        names[id(parameter)]: (group["initial_lr"], group["weight_decay"])
        for group in adamw.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("trained", ["decoder", "decoder+neck", "all"])
def test_groups_hold_each_trained_parameter_once(model: SAM2Base, trained: Trained) -> None:
    network = Network(model, trained, CPU)
    adamw = optimizer(network, Sam2Options(train=trained), LR)
    held = [id(parameter) for group in adamw.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in network.trained_parameters().values()}


def test_biases_norms_and_embeddings_are_not_decayed(model: SAM2Base) -> None:
    network = Network(model, "all", CPU)
    found = _by_name(network, optimizer(network, Sam2Options(train="all", weight_decay=0.05), LR))
    assert {decay for _, decay in found.values()} == {0.0, 0.05}
    kept = {name for name, (_, decay) in found.items() if not decay}
    parameters = network.trained_parameters()
    assert kept >= {name for name, parameter in parameters.items() if parameter.ndim == 1}
    assert {name for name in kept if parameters[name].ndim > 1} == {
        "image_encoder.trunk.pos_embed",
        "image_encoder.trunk.pos_embed_window",
        "sam_mask_decoder.iou_token.weight",
        "sam_mask_decoder.mask_tokens.weight",
        "sam_mask_decoder.obj_score_token.weight",
        "sam_prompt_encoder.no_mask_embed.weight",
        "sam_prompt_encoder.not_a_point_embed.weight",
        *(f"sam_prompt_encoder.point_embeddings.{kind}.weight" for kind in range(4)),
    }


def test_the_encoder_learns_slower_and_its_trunk_ever_slower_downwards(model: SAM2Base) -> None:
    network = Network(model, "all", CPU)
    found = _by_name(network, optimizer(network, Sam2Options(train="all"), LR))
    trunk = "image_encoder.trunk."
    expected = {
        "sam_mask_decoder.transformer.layers.0.norm1.weight": 1.0,
        "sam_prompt_encoder.no_mask_embed.weight": 1.0,
        "sam_mask_decoder.conv_s0.weight": 1.0,
        "image_encoder.neck.convs.0.conv.weight": 0.6,
        f"{trunk}blocks.11.attn.qkv.weight": 0.6 * 0.9,
        f"{trunk}blocks.10.attn.qkv.weight": 0.6 * 0.9**2,
        f"{trunk}blocks.0.norm1.bias": 0.6 * 0.9**12,
        f"{trunk}patch_embed.proj.weight": 0.6 * 0.9**13,
        f"{trunk}pos_embed": 0.6,
        f"{trunk}pos_embed_window": 0.6,
    }
    for name, share in expected.items():
        assert found[name][0] == pytest.approx(LR * share), name


def test_its_state_is_there_before_the_first_step(model: SAM2Base) -> None:
    """And is the one that AdamW would have made."""
    network = Network(model, "decoder", CPU)
    parameters = network.trained_parameters()
    ours = optimizer(network, Sam2Options(weight_decay=0.0), LR)
    assert len(ours.state) == len(parameters)

    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    after: list[dict[str, torch.Tensor]] = []
    for adamw in (ours, torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0, fused=True)):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
                parameter.grad = torch.full_like(parameter, 0.5)
        adamw.step()
        adamw.step()
        after.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    for name, tensor in after[0].items():
        assert torch.equal(tensor, after[1][name]), name
        assert not torch.equal(tensor, before[name]), name


def _factors(steps_per_epoch: int = 4, **options: float) -> list[float]:
    chosen = Sam2Options.model_validate({"epochs": 3, **options})
    return [
        learning_rate(chosen, step, steps_per_epoch) for step in range(int(chosen.epochs) * steps_per_epoch)
    ]


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    factors = _factors(warmup_epochs=1, lrf=0.1)
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)
    assert _factors(warmup_epochs=0, steps_per_epoch=3)[4] == pytest.approx(0.55), "half way down"


@pytest.mark.parametrize(
    ("options", "steps_per_epoch", "first", "last"),
    [
        ({"warmup_epochs": 0}, 4, 1.0, 0.1),
        ({"warmup_epochs": 0, "lrf": 1.0}, 4, 1.0, 1.0),
        ({"warmup_epochs": 0, "lrf": 0.0}, 4, 1.0, 0.0),
        ({"warmup_epochs": 0.5}, 4, 1 / 3, 0.1),
        ({"warmup_epochs": 100}, 4, 1 / 12, 1.0),  # all of it is warm-up
        ({"warmup_epochs": 1, "epochs": 1}, 1, 1.0, 1.0),  # a single step
    ],
)
def test_the_first_and_the_last_rate(
    options: dict[str, float], steps_per_epoch: int, first: float, last: float
) -> None:
    factors = _factors(steps_per_epoch, **options)
    assert (factors[0], factors[-1]) == pytest.approx((first, last))
    assert all(0 <= factor <= 1 for factor in factors)
