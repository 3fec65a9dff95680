"""Steps of SAM2's optimizer: what they change, whatever is done at once, and what ends them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from rvmcv_worker.compute import sam2_checkpoint, sam2_loss, sam2_prompts, sam2_step
from rvmcv_worker.compute.child import StopRequestedError
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.compute.sam2_optimizer import optimizer
from rvmcv_worker.compute.sam2_samples import Batch
from rvmcv_worker.compute.sam2_step import Step
from rvmcv_worker.errors import InvalidJobError, OutOfGpuMemoryError
from rvmcv_worker.sam2_options import Sam2Options, Trained
from tests import sam2_files

PX = 64
CPU = torch.device("cpu")
MODES: tuple[Trained, ...] = ("decoder", "decoder+neck", "all")
SEED = (0, 1, 2)
#: No clicks, which follow from masks, so that a rounding has no more than its own effect.
SMOOTH: dict[str, Any] = {"imgsz": PX, "batch": 2, "objects": 3, "clicks": 0, "clip_norm": 1000.0}


@pytest.fixture(scope="module")
def built() -> SAM2Base:
    return sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=PX)


@pytest.fixture
def model(built: SAM2Base) -> SAM2Base:
    """A model as it was before any test."""
    built.load_state_dict(sam2_files.weights())
    return built


class Steps:
    """A step with what belongs to it."""

    def __init__(
        self,
        model: SAM2Base,
        *,
        at_once: tuple[int, int] | None = None,
        check_stop: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        self.options = Sam2Options.model_validate({**SMOOTH, **options})
        self.network = Network(model, self.options.train, CPU)
        self.optimizer = optimizer(self.network, self.options, 1e-3)
        self.said: list[str] = []
        self.memory = Memory(self.options, CPU, self.said.append)
        if at_once:
            self.memory.images_at_once, self.memory.objects_at_once = at_once
        self.step = Step(self.network, self.optimizer, self.options, self.memory, check_stop)

    def run(self, seed: tuple[int, int, int] = SEED, lr_factor: float = 1.0) -> dict[str, float]:
        return self.step.run(_batch(self.network), seed, lr_factor)

    def gradient(self) -> Tensor:
        """Return the gradient of a step that changes nothing."""
        self.run(lr_factor=0.0)
        gradients = [each.grad for each in self.network.trained_parameters().values()]
        return torch.cat([each.flatten() for each in gradients if each is not None])


def _batch(network: Network) -> Batch:
    """Two images, with two objects and three."""
    squares = torch.randn(2, 3, PX, PX, generator=torch.Generator().manual_seed(5))
    rows, columns = torch.arange(PX)[:, None], torch.arange(PX)
    centres = [(20, 20), (40, 45), (15, 45), (50, 15), (32, 32)]
    masks = torch.stack([(rows - y) ** 2 + (columns - x) ** 2 < 120 for y, x in centres])
    return Batch(network.frozen(squares), masks, torch.tensor([0, 0, 1, 1, 1]))


def _copy(model: SAM2Base) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("trained", MODES)
def test_a_step_changes_what_is_trained_and_nothing_else(model: SAM2Base, trained: Trained) -> None:
    steps = Steps(model, train=trained, clicks=1)
    before = _copy(model)
    losses = steps.run()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    names = set(steps.network.trained_parameters())
    assert changed <= names
    assert not {
        name for name in names - changed if not name.endswith("bias")
    }  # those of keys have no gradient
    assert set(losses) == {"total", "mask", "dice", "iou", "object"}
    expected = 20 * losses["mask"] + losses["dice"] + losses["iou"] + losses["object"]
    assert losses["total"] == pytest.approx(expected)


@pytest.mark.parametrize("trained", MODES)
def test_the_gradient_does_not_depend_on_what_is_done_at_once(model: SAM2Base, trained: Trained) -> None:
    whole = Steps(model, train=trained, at_once=(2, 6)).gradient()
    assert whole.norm() > 0.01
    for at_once in ((1, 1), (2, 2)):
        parts = Steps(model, train=trained, at_once=at_once).gradient()
        _require_same(parts, whole)


def test_the_gradient_is_that_of_the_mean_over_the_objects(model: SAM2Base) -> None:
    """Worked out without a `Step`: every object by itself, through all of the network."""
    steps = Steps(model, train="all", box_share=1.0)
    ours, network, batch = steps.gradient(), steps.network, _batch(steps.network)
    chances = _chances(SEED, len(batch.masks))
    steps.optimizer.zero_grad()
    for number in range(len(batch.masks)):
        one = slice(number, number + 1)
        prompts, _ = sam2_prompts.first_prompts(batch.masks[one], chances[one], box_share=1.0)
        features = network.features(batch.frozen)
        decoded = network.decode(features, batch.image_of[one], prompts, multimask=False)
        losses, _ = sam2_loss.losses(decoded, batch.masks[one])
        torch.autograd.backward(losses.total.sum() / len(batch.masks))
    gradients = [each.grad for each in network.trained_parameters().values()]
    theirs = torch.cat([each.flatten() for each in gradients if each is not None])
    _require_same(ours, theirs)


def _require_same(gradient: Tensor, other: Tensor) -> None:
    """Require that two gradients differ in the order of their sums, and no more."""
    assert (gradient - other).norm() < 3e-5 * other.norm()


def _chances(seed: tuple[int, int, int], objects: int) -> Tensor:
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    return sam2_prompts.draw(objects, 0, torch.Generator().manual_seed(number))


def test_two_runs_with_one_seed_are_equal_and_with_another_are_not(model: SAM2Base) -> None:
    seen: list[tuple[list[dict[str, float]], dict[str, Tensor]]] = []
    for seed in (0, 0, 1):
        model.load_state_dict(sam2_files.weights())
        torch.manual_seed(len(seen))  # global chance has no part in it
        steps = Steps(model, train="decoder+neck", clicks=2)
        losses = [steps.run((seed, 0, position)) for position in range(2)]
        seen.append((losses, _copy(model)))
    (losses, first), (same_losses, second), (_, other) = seen
    assert losses == same_losses
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_steps_lessen_the_loss(model: SAM2Base) -> None:
    steps = Steps(model, clicks=1, clip_norm=0.1)
    totals = [steps.run()["total"] for _ in range(8)]
    assert totals[-1] < 0.8 * totals[0], totals


@pytest.mark.parametrize("trained", MODES)
def test_a_step_can_be_computed_in_bf16(model: SAM2Base, trained: Trained) -> None:
    """As on a GPU; a CPU has the same kinds of numbers, only slower."""
    exact = Steps(model, train=trained).run(lr_factor=0.0)
    steps = Steps(model, train=trained)
    steps.network._bf16 = True
    losses = steps.run()
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.05)
    assert all(tensor.dtype is torch.float32 for tensor in model.state_dict().values())
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_the_gradient_is_clipped(model: SAM2Base) -> None:
    assert Steps(model, clip_norm=0.01).gradient().norm() == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_is_that_of_the_step(model: SAM2Base) -> None:
    steps = Steps(model, train="decoder+neck")
    steps.run(lr_factor=0.25)
    for group in steps.optimizer.param_groups:
        assert group["lr"] == 0.25 * group["initial_lr"]


def _run_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB (a test)")


@pytest.fixture(scope="module")
def one_by_one(built: SAM2Base) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The losses and the outcome of a step that has one object at once from the start."""
    built.load_state_dict(sam2_files.weights())
    losses = Steps(built, train="decoder+neck", clicks=1, at_once=(2, 1)).run()
    return losses, _copy(built)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Network, "features"),
        (Network, "decode"),
        (sam2_loss, "losses"),
        (sam2_prompts, "correct"),
        (torch.autograd, "backward"),
        (sam2_step, "clip_grad_norm_"),
        (torch.optim.AdamW, "step"),
    ],
)
def test_a_step_that_ran_out_of_memory_is_done_again_with_less(
    one_by_one: tuple[dict[str, float], dict[str, Tensor]],
    model: SAM2Base,
    owner: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same, to the last bit, as one that had as little at once from the start."""
    expected_losses, expected_state = one_by_one
    steps = Steps(model, train="decoder+neck", clicks=1, at_once=(2, 2))
    original, calls = getattr(owner, name), 0
    once = {"features", "clip_grad_norm_", "step"}

    def short(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        # Where there are several calls in a step, the first ones leave something that is to be dropped.
        if steps.memory.objects_at_once > 1 and (calls > 1 or name in once):
            _run_out()
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, short)
    losses = steps.run()
    assert steps.memory.objects_at_once == 1
    assert len(steps.said) == 1
    assert losses == expected_losses
    assert all(torch.equal(tensor, expected_state[key]) for key, tensor in model.state_dict().items())


def test_memory_that_is_never_enough_ends_the_job_and_changes_nothing(
    model: SAM2Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(model, at_once=(1, 1))
    before = _copy(model)
    monkeypatch.setattr(Network, "decode", lambda *_, **__: _run_out())
    with pytest.raises(OutOfGpuMemoryError):
        steps.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_training_that_diverged_ends_with_its_parameters_as_they_were(
    model: SAM2Base, value: float
) -> None:
    steps = Steps(model)
    with torch.no_grad():
        model.sam_mask_decoder.mask_tokens.weight[0, 0] = value
    before = copy.deepcopy(steps.optimizer.state_dict())
    with pytest.raises(InvalidJobError, match=r"the training diverged \(loss nan\); use a smaller lr0"):
        steps.run()
    after = steps.optimizer.state_dict()
    for number, state in before["state"].items():
        assert all(torch.equal(state[key], after["state"][number][key]) for key in state)


def test_it_can_be_stopped_between_a_few_objects_and_the_next(model: SAM2Base) -> None:
    asked = 0

    def check_stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise StopRequestedError

    steps = Steps(model, at_once=(2, 1), check_stop=check_stop)
    before = _copy(model)
    with pytest.raises(StopRequestedError):
        steps.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    asked = 10
    steps.run()
    assert asked == 15, "once for each object"
