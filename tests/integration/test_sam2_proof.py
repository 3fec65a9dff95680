"""What a SAM2 model is worth on a split: as it is served, against the `sam2` package's own predictor."""

from __future__ import annotations

import copy
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sam2.sam2_image_predictor import SAM2ImagePredictor

from rvmcv_worker.compute import mask_metrics, sam2_checkpoint
from rvmcv_worker.compute.instances import Instance, LabelledImage
from rvmcv_worker.compute.rle import Rle
from rvmcv_worker.compute.sam2_embeddings import Embeddings
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Decoded, Features, Network, Prompts
from rvmcv_worker.compute.sam2_proof import Proof
from rvmcv_worker.compute.sam2_samples import UPRIGHT, Flip, Samples
from rvmcv_worker.compute.segmenter import Segmenter
from rvmcv_worker.errors import ModelInvalidError, OutOfGpuMemoryError
from rvmcv_worker.sam2_options import CacheMode, Sam2Options
from tests import sam2_files

IMAGE_PX = 128
CPU = torch.device("cpu")
NAMES = ["box", "disc", "ring", "none"]
SIZES = [(90, 120), (200, 61)]

Mask = NDArray[np.bool_]


def _pixels(seed: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)


def _polygon(class_id: int, *points: tuple[float, float]) -> Instance:
    return Instance(class_id, (np.array(points, np.float32),))


def _objects(size: tuple[int, int]) -> tuple[Instance, ...]:
    """A rectangle, a disc, a ring as run lengths in the image's corner, and one that is too small."""
    height, width = size
    turns = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    disc = np.stack([0.7 + 0.2 * np.cos(turns), 0.6 + 0.2 * np.sin(turns)], 1).astype(np.float32)
    rows, columns = np.ogrid[:height, :width]
    far = np.hypot(rows / height, columns / width)
    ring = (far > 0.25) & (far < 0.45)
    return (
        _polygon(0, (0.1, 0.6), (0.4, 0.6), (0.4, 0.9), (0.1, 0.9)),
        Instance(1, (disc,)),
        Instance(2, rle=_rle(ring)),
        _polygon(0, (0.9, 0.9), (0.905, 0.9), (0.905, 0.905)),
    )


def _rle(mask: Mask) -> Rle:
    column_by_column = np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])
    changes = np.flatnonzero(np.diff(column_by_column))
    return Rle(*mask.shape, np.diff(changes, prepend=0).astype(np.uint32))


def _drawn(data: Path, sizes: list[tuple[int, int]]) -> Samples:
    images = []
    for number, size in enumerate(sizes):
        cv2.imwrite(str(data / f"{number}.png"), _pixels(number, size))
        images.append(LabelledImage(f"{number}.png", *size, _objects(size)))
    return Samples(data, images, IMAGE_PX, split="val")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return _drawn(tmp_path_factory.mktemp("data"), SIZES)


@pytest.fixture(scope="module")
def network() -> Network:
    model = sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=IMAGE_PX)
    model.load_state_dict(sam2_files.weights())
    return Network(model, "decoder", CPU)


class Unrounded:
    """What a cache hands out, but in fp32, as the segmenter keeps it."""

    def __init__(self, samples: Samples, segmenter: Segmenter) -> None:
        self._samples, self._segmenter = samples, segmenter

    def get(self, index: int, flip: Flip) -> tuple[torch.Tensor, ...]:
        assert flip == UPRIGHT
        embedding = self._segmenter._encode(self._samples.image(index))
        return tuple(each[0] for each in (embedding.image, *embedding.high_resolution))


@pytest.fixture(scope="module")
def segmenter(network: Network) -> Segmenter:
    segmenter = Segmenter(copy.deepcopy(network.model), "0" * 64, device=CPU, cache=None)
    segmenter.precision = "fp32"
    return segmenter


def _memory(said: Callable[[str], None] = print, **changed: int) -> Memory:
    memory = Memory(Sam2Options(), CPU, said)
    for name, value in changed.items():
        setattr(memory, name, value)
    return memory


def _proof(samples: Samples, cache: Any = None, **changed: Any) -> Proof:
    parts = {"memory": _memory(), "check_stop": lambda: None, "tick": lambda *_: None, **changed}
    return Proof(samples, cache, NAMES, **parts)


def _truths(samples: Samples, index: int, size: tuple[int, int]) -> list[Mask]:
    return [found.mask(*size) for found in samples.objects(index)]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("fallback", [True, False])
def test_masks_are_to_the_pixel_those_that_are_served(
    index: int,
    fallback: bool,
    samples: Samples,
    network: Network,
    segmenter: Segmenter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the fallback a box has the best of three masks here: random weights have no stable one."""
    for model in (network.model, segmenter._model):
        monkeypatch.setattr(model.sam_mask_decoder, "dynamic_multimask_via_stability", fallback)
    truths = _truths(samples, index, SIZES[index])
    boxes = np.array([mask_metrics.box_of(truth) for truth in truths], np.float32)
    served = list(segmenter.segment(samples.image(index), boxes, image_key=""))

    of_same_features = _proof(samples, Unrounded(samples, segmenter)).masks(network, index)
    as_cached = _proof(samples).masks(network, index)

    assert len(truths) == 3
    np.testing.assert_array_equal(of_same_features, served)
    # The cache's fp16 moves a logit by a thousandth: few pixels are so close to the mask's edge.
    assert (np.array(as_cached) != served).mean() < 0.002
    assert 0.02 < np.mean(served) < 0.98, "masks of everything or nothing would show little"


def test_a_model_of_another_size_is_measured_on_the_same_objects(samples: Samples, network: Network) -> None:
    """As the active model may be: only its squares differ."""
    other = sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=IMAGE_PX // 2)
    other.load_state_dict(network.model.state_dict())
    segmenter = Segmenter(other, "0" * 64, device=CPU, cache=None)
    segmenter.precision = "fp32"
    small = Network(other, "decoder", CPU)

    masks = _proof(samples, Unrounded(samples, segmenter)).masks(small, 0)
    score = _proof(samples).measure(small)

    boxes = [mask_metrics.box_of(truth) for truth in _truths(samples, 0, SIZES[0])]
    served = segmenter.segment(samples.image(0), np.array(boxes, np.float32), image_key="")
    np.testing.assert_array_equal(masks, list(served))
    assert (score.instances, score.left_out) == (6, 2)
    assert score.miou != _proof(samples).measure(network).miou


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_what_is_kept_is_worth_what_is_encoded_anew(
    mode: CacheMode, tmp_path: Path, samples: Samples, network: Network
) -> None:
    embeddings = Embeddings(
        samples,
        network,
        _memory(),
        Sam2Options(cache=mode, imgsz=IMAGE_PX),
        [(index, UPRIGHT) for index in range(len(samples))],
        path=tmp_path / "val.f16",
        limit_bytes=1 << 30,
    )
    with embeddings:
        embeddings.fill(lambda *_: None)
        assert len(samples) * (256 * 8**2 + 32 * 32**2 + 64 * 16**2) * 2 == embeddings.kept_bytes
        assert _proof(samples, embeddings).measure(network) == _proof(samples).measure(network)


def test_a_large_image_is_measured_at_a_smaller_size(
    tmp_path: Path, network: Network, segmenter: Segmenter
) -> None:
    samples = _drawn(tmp_path, [(1100, 1500)])
    masks = _proof(samples, Unrounded(samples, segmenter)).masks(network, 0)

    assert {mask.shape for mask in masks} == {(751, 1024)}
    boxes = np.array([mask_metrics.box_of(each) for each in _truths(samples, 0, (751, 1024))], np.float32)
    boxes *= np.float32([1500 / 1024, 1100 / 751] * 2)
    served = segmenter.segment(samples.image(0), boxes, image_key="")
    for mask, at_own_size in zip(masks, served, strict=True):
        shrunk = cv2.resize(at_own_size.view(np.uint8), (1024, 751), interpolation=cv2.INTER_NEAREST_EXACT)
        assert (mask != shrunk).mean() < 0.01  # the edges of random weights' masks are long


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # the predictor's own
def test_a_score_is_that_of_the_packages_predictor(
    samples: Samples, network: Network, segmenter: Segmenter
) -> None:
    predictor = SAM2ImagePredictor(network.model)
    predictor._bb_feat_sizes = [(IMAGE_PX // shrunk,) * 2 for shrunk in (4, 8, 16)]  # it has those of 1024
    fits = []
    for index, (height, width) in enumerate(SIZES):
        predictor.set_image(np.ascontiguousarray(samples.image(index)[..., ::-1]))
        for truth in _truths(samples, index, (height, width)):
            boxed, _, _ = predictor.predict(
                box=np.float64(mask_metrics.box_of(truth)), multimask_output=False
            )
            # The middle of the pixel; half a pixel of the square SAM2 adds itself.
            half = np.float64([width, height]) / IMAGE_PX / 2
            click = np.float64(mask_metrics.deepest(truth)) + 0.5 - half
            clicked, rated, _ = predictor.predict(click[None], np.array([1]), multimask_output=True)
            with_box, with_click = boxed[0] > 0, clicked[rated.argmax()] > 0
            fits.append(
                (
                    mask_metrics.iou(with_box, truth),
                    mask_metrics.iou(with_click, truth),
                    mask_metrics.boundary_f(with_box, truth),
                )
            )

    # One at a time, as there: sums are rounded in the same order.
    one = _memory(objects_at_once=1)
    score = _proof(samples, Unrounded(samples, segmenter), memory=one).measure(network)

    assert score.instances == 6
    assert (score.miou, score.miou_click, score.boundary_f) == pytest.approx(np.mean(fits, 0), abs=1e-5)
    assert score.left_out == 2
    assert [score.per_class[name]["instances"] for name in NAMES] == [2, 2, 2, 0]
    assert score.per_class["none"]["miou"] is None
    by_class = np.array([fits[class_id::3] for class_id in range(3)]).mean(1)
    assert [score.per_class[name]["miou_click"] for name in NAMES[:3]] == pytest.approx(
        by_class[:, 1].tolist(), abs=1e-5
    )


def test_a_second_measurement_is_the_same_and_a_model_in_training_is_measured_as_served(
    samples: Samples, network: Network
) -> None:
    proof = _proof(samples)
    first = proof.measure(network)
    network.train()
    again = proof.measure(network)

    assert again == first
    assert not network.model.training


def test_how_many_objects_at_once_changes_no_more_than_rounding(samples: Samples, network: Network) -> None:
    scores = [_proof(samples, memory=_memory(objects_at_once=count)).measure(network) for count in (1, 64)]
    assert scores[1].flat() == pytest.approx(scores[0].flat(), abs=5e-4)


def test_the_ground_truths_box_is_a_mask_too(samples: Samples) -> None:
    score = _proof(samples).box_as_mask()

    assert score.per_class["box"]["miou"] == score.per_class["box"]["boundary_f"] == 1.0
    assert score.per_class["disc"]["miou"] == pytest.approx(math.pi / 4, abs=0.02)
    assert score.per_class["ring"]["boundary_f"] < 0.6
    assert score.miou_click is None
    assert score.instances == 6


class Short(Network):
    """A network on a GPU whose memory holds only so many objects."""

    holds = 1

    def decode(
        self, features: Features, image_of: torch.Tensor, prompts: Prompts, *, multimask: bool
    ) -> Decoded:
        if len(image_of) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB (a test)")
        return super().decode(features, image_of, prompts, multimask=multimask)


def test_where_memory_runs_out_fewer_objects_are_decoded_at_once(samples: Samples, network: Network) -> None:
    short, said = Short(network.model, "decoder", CPU), []
    measured = _proof(samples, memory=_memory(said.append, objects_at_once=4)).measure(short)

    assert measured == _proof(samples, memory=_memory(objects_at_once=1)).measure(network)
    assert len(said) == 2
    assert "1 object" in said[-1]

    short.holds = 0
    with pytest.raises(OutOfGpuMemoryError):
        _proof(samples).measure(short)


@pytest.mark.parametrize(
    "tensor", ["iou_prediction_head.layers.2.bias", "output_hypernetworks_mlps.0.layers.2.bias"]
)
def test_numbers_that_are_not_finite_are_the_models_fault(
    tensor: str, samples: Samples, network: Network
) -> None:
    broken = copy.deepcopy(network)
    with torch.no_grad():
        broken.model.sam_mask_decoder.get_parameter(tensor).fill_(math.nan)

    with pytest.raises(ModelInvalidError, match="no finite numbers"):
        _proof(samples).measure(broken)


class StopError(Exception):
    pass


def test_it_ends_between_two_objects_and_says_how_far_it_is(samples: Samples, network: Network) -> None:
    ticks: list[tuple[int, int]] = []
    asked = 0

    def check_stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 5:
            raise StopError

    proof = _proof(samples, check_stop=check_stop, tick=lambda *told: ticks.append(told))
    with pytest.raises(StopError):  # once an image, and before each two of its three objects
        proof.measure(network)
    assert ticks == [(1, 2)]
    proof.measure(network)
    assert ticks[1:] == [(1, 2), (2, 2)]


def test_memory_is_that_of_a_few_masks_however_many_objects_there_are(
    tmp_path: Path, network: Network
) -> None:
    size = (900, 1000)
    cv2.imwrite(str(tmp_path / "a.png"), _pixels(0, size))
    squares = [
        _polygon(0, (x, y), (x + 0.08, y), (x + 0.08, y + 0.08), (x, y + 0.08))
        for x in np.arange(0, 0.8, 0.1)
        for y in (0.1, 0.5)
    ]
    samples = Samples(tmp_path, [LabelledImage("a.png", *size, tuple(squares))], IMAGE_PX)
    proof = _proof(samples)
    tracemalloc.start()
    try:
        score = proof.measure(network)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert score.instances == 16  # 14 MB of masks, were they all there
    assert peak < 9_000_000


def test_photographs_of_garbage_are_measured(shared: Path, network: Network) -> None:
    data = shared / "datasets/garbage_seg"
    images = []
    for path in sorted((data / "images/val").iterdir())[::20]:
        height, width = cv2.imread(str(path)).shape[:2]
        lines = (data / "labels/val" / f"{path.stem}.txt").read_text().splitlines()
        objects = [
            Instance(int(number), (np.array(vertices, np.float32).reshape(-1, 2),))
            for number, *vertices in map(str.split, lines)
        ]
        images.append(LabelledImage(f"images/val/{path.name}", height, width, tuple(objects)))
    samples = Samples(data, images, IMAGE_PX, split="val")
    names = ["biological", "cardboard", "glass", "metal", "paper", "plastic"]
    proof = Proof(samples, None, names, _memory(), lambda: None, lambda *_: None)

    score, box = proof.measure(network), proof.box_as_mask()

    assert score.instances + score.left_out == sum(len(image.instances) for image in images)
    assert score.instances == box.instances == sum(each["instances"] for each in score.per_class.values())
    # A model of random weights knows less than the box; photographed things fill much of theirs.
    assert 0 < score.miou < box.miou < 0.95
    assert box.miou > 0.5
    assert 0 < score.boundary_f < 0.7
