"""SAM2's training learns: two drawn images by heart, from random weights, with a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from rvmcv_worker.compute import instances, sam2_checkpoint, sam2_optimizer
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Decoded, Features, Network, Prompts
from rvmcv_worker.compute.sam2_proof import Proof
from rvmcv_worker.compute.sam2_samples import Batch, Samples
from rvmcv_worker.compute.sam2_score import Score
from rvmcv_worker.compute.sam2_step import Step
from rvmcv_worker.sam2_options import Sam2Options
from tests import sam2_files, sam2_jobs

IMAGE_PX = 128
CPU = torch.device("cpu")


class Learner:
    """A scratch model, and the same two images in every step."""

    def __init__(self, samples: Samples, **options: float) -> None:
        self.options = Sam2Options.model_validate({"imgsz": IMAGE_PX, "batch": 2, **options})
        model = sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=IMAGE_PX)
        model.load_state_dict(sam2_files.weights())
        self.network = Network(model, "decoder", CPU)
        self.network.eval()
        objects = [samples.masks(index) for index in range(len(samples))]
        image_of = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(each) for each in objects]))
        squares = torch.stack([samples.square(index) for index in range(len(samples))])
        self.batch = Batch(self.network.frozen(squares), torch.cat(objects), image_of)
        memory = Memory(self.options, CPU, print)
        optimizer = sam2_optimizer.optimizer(self.network, self.options, lr0=1e-3)
        self._step = Step(self.network, optimizer, self.options, memory, lambda: None)
        self._proof = Proof(
            samples, None, sam2_jobs.NAMES, memory, check_stop=lambda: None, tick=lambda _done, _of: None
        )
        self.steps = 0

    def learn(self, steps: int, lr_factor: float = 1.0) -> dict[str, float]:
        for _ in range(steps):
            losses = self._step.run(self.batch, (self.options.seed, 1, self.steps), lr_factor)
            self.steps += 1
        return losses

    def learn_until(self, enough: Callable[[Score], bool], most_steps: int) -> Score:
        score = self.measure()
        while not enough(score) and self.steps < most_steps:
            self.learn(10)
            score = self.measure()
        return score

    def measure(self) -> Score:
        return self._proof.measure(self.network)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Two images with two curved objects on noise each."""
    root = tmp_path_factory.mktemp("drawn")
    sam2_jobs.draw_prepared(root, {"train": 2}, IMAGE_PX)
    data = root / "prepare" / "data"
    return Samples(data, instances.read(data / "instances" / "train.jsonl"), IMAGE_PX)


@pytest.fixture(autouse=True)
def _bit_for_bit() -> Iterator[None]:
    """One thread: with more, sums are in another order on a machine with another number of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_boxes_are_learned_by_heart(samples):
    learner = Learner(samples, box_share=1, clicks=0)
    score = learner.learn_until(lambda score: score.miou >= 0.95, most_steps=300)
    assert score.miou >= 0.95


@pytest.mark.slow
def test_boxes_points_and_corrections_are_learned_together(samples):
    learner = Learner(samples)
    assert (learner.options.box_share, learner.options.clicks) == (0.5, 2)
    untrained = learner.measure()
    assert untrained.miou < 0.5
    assert untrained.miou_click < 0.5
    score = learner.learn_until(lambda score: score.miou >= 0.95 and score.miou_click >= 0.8, most_steps=300)
    assert score.miou >= 0.95
    assert score.miou_click >= 0.8


def test_the_rounds_of_a_step_are_those_of_metas_training(samples, monkeypatch):
    learner = Learner(samples)
    network, model = learner.network, learner.network.model
    with torch.no_grad():  # Meta blanks the masks of objects that the model thinks absent; we do not
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(100)
    said: list[tuple[Features, torch.Tensor, Prompts, bool, Decoded]] = []
    decode = network.decode

    def listen(features: Features, image_of: torch.Tensor, prompts: Prompts, *, multimask: bool) -> Decoded:
        decoded = decode(features, image_of, prompts, multimask=multimask)
        said.append((features, image_of, prompts, multimask, decoded))
        return decoded

    monkeypatch.setattr(network, "decode", listen)
    learner.learn(1, lr_factor=0.0)

    assert {multimask for *_, multimask, _ in said} == {True, False}  # points and boxes
    last_shown = None
    for features, image_of, prompts, _, decoded in said:
        points = {"point_coords": prompts.points, "point_labels": prompts.kinds}
        image, fine, middle = (each[image_of] for each in features)
        with torch.no_grad():
            # As `SAM2Train._iter_correct_pt_sampling` calls it.
            logits, _, ious, shown, _, _, object_score = model._forward_sam_heads(
                image, points, prompts.logits, [fine, middle], model._use_multimask(True, points)
            )
        for ours, theirs in zip(decoded, (logits, ious, object_score), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        if prompts.logits is not None:
            torch.testing.assert_close(prompts.logits, last_shown.clamp(-32, 32), rtol=1e-4, atol=1e-5)
        last_shown = shown
    assert sum(prompts.logits is None for _, _, prompts, _, _ in said) * 3 == len(said)


def test_one_seed_is_one_training(samples):
    one, again, other = (Learner(samples, seed=seed) for seed in (3, 3, 4))
    first = torch.random.get_rng_state()
    losses = one.learn(2)
    torch.rand(5)  # global chance has no part in it
    assert again.learn(2) == losses
    assert other.learn(2) != losses
    torch.random.set_rng_state(first)
    weights = again.network.model.state_dict()
    untrained = sam2_files.weights()
    changed = 0
    for name, tensor in one.network.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
        changed += not torch.equal(tensor, untrained[name])
    assert changed > 50
