"""SAM2 on boxes, against the `sam2` package's own predictor."""

from __future__ import annotations

import hashlib
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

from rvmcv_worker.compute import segmenter as segmenter_module
from rvmcv_worker.compute.embedding_cache import EmbeddingCache
from rvmcv_worker.compute.segmenter import Segmenter, open_segmenter
from rvmcv_worker.errors import ModelInvalidError
from tests import sam2_files

#: Edge of the square that the quick tests encode, in pixels; 1.6 % of the work of 1024.
SMALL_PX = 128
PLENTY_BYTES = 1 << 30


def _image(height: int = 90, width: int = 120, seed: int = 0) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    rows, columns = np.arange(height) * 6 // height, np.arange(width) * 8 // width
    return coarse[rows][:, columns]


def _boxes(count: int, height: int = 90, width: int = 120) -> NDArray[np.float32]:
    dice = np.random.default_rng(7)
    corners = np.sort(dice.uniform(0, 1, (count, 2, 2)), axis=1)
    return (corners * (width, height)).reshape(count, 4).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sam2_files.save(tmp_path_factory.mktemp("sam2") / "tiny.pt")


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sam2_files.save(tmp_path_factory.mktemp("sam2") / "small.pt", image_px=SMALL_PX)


@pytest.fixture(scope="module")
def small(small_checkpoint: Path) -> Segmenter:
    """A segmenter that keeps nothing."""
    return open_segmenter(small_checkpoint, device="cpu", cache=None)


class Counted:
    """The images that a model has encoded, whoever asked."""

    def __init__(self, model: SAM2Base) -> None:
        self.model = model
        self.encoded = 0

    def segmenter(self, cache: EmbeddingCache, sha256: str = "0" * 64) -> Segmenter:
        return Segmenter(self.model, sha256, device=torch.device("cpu"), cache=cache)

    def count(self, *_: object) -> None:
        self.encoded += 1


@pytest.fixture
def counted(small: Segmenter) -> Iterator[Counted]:
    counted = Counted(small._model)
    hook = counted.model.image_encoder.register_forward_hook(counted.count)
    yield counted
    hook.remove()


def _masks(segmenter: Segmenter, image: NDArray[np.uint8], count: int, key: str) -> NDArray[np.bool_]:
    return np.stack(list(segmenter.segment(image, _boxes(count, *image.shape[:2]), image_key=key)))


@pytest.fixture(scope="module")
def at_full_edge(checkpoint: Path) -> Segmenter:
    return open_segmenter(checkpoint, device="cpu", cache=EmbeddingCache(PLENTY_BYTES))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # the predictor's own
def test_masks_equal_those_of_the_packages_predictor(at_full_edge: Segmenter) -> None:
    image, boxes = _image(333, 500), _boxes(6, 333, 500)
    masks = np.stack(list(at_full_edge.segment(image, boxes, image_key="a")))

    predictor = SAM2ImagePredictor(at_full_edge._model)
    chunk = segmenter_module._CHUNK["cpu"]
    with at_full_edge._autocast():
        predictor.set_image(np.ascontiguousarray(image[..., ::-1]))
        theirs = [
            predictor.predict(box=boxes[start : start + chunk], multimask_output=False)[0].reshape(
                -1, 333, 500
            )
            for start in range(0, len(boxes), chunk)
        ]
        at_once = predictor.predict(box=boxes, multimask_output=False)[0][:, 0]

    np.testing.assert_array_equal(masks, np.concatenate(theirs).astype(bool))
    # All at once, sums are rounded in another order.
    assert (masks != at_once.astype(bool)).mean() < 0.005
    assert 0 < masks.mean() < 1, "masks of everything or nothing would show little"


@pytest.mark.slow
def test_a_second_question_costs_only_the_decoder(at_full_edge: Segmenter) -> None:
    image, boxes = _image(seed=1), _boxes(1)
    taken_s = []
    for _ in range(2):
        started_s = time.perf_counter()
        list(at_full_edge.segment(image, boxes, image_key="b"))
        taken_s.append(time.perf_counter() - started_s)
    assert taken_s[1] < taken_s[0] / 5, taken_s


def test_masks_are_bool_of_the_images_size_and_the_same_each_time(small: Segmenter) -> None:
    image, boxes = _image(), _boxes(5)
    first, second = (list(small.segment(image, boxes, image_key="a")) for _ in range(2))
    assert [mask.shape for mask in first] == [(90, 120)] * 5
    assert {mask.dtype for mask in first} == {np.dtype(bool)}
    np.testing.assert_array_equal(first, second)


def test_bgr_becomes_rgb(small: Segmenter) -> None:
    """The predictor is given RGB; the same image with its channels swapped must be another one."""
    image, boxes = _image(), _boxes(2)
    swapped = np.ascontiguousarray(image[..., ::-1])
    masks, other = (list(small.segment(each, boxes, image_key="a")) for each in (image, swapped))
    assert not np.array_equal(masks, other)


def test_an_image_is_encoded_once_for_all_boxes_and_all_questions(counted: Counted) -> None:
    segmenter = counted.segmenter(EmbeddingCache(PLENTY_BYTES))
    first = _masks(segmenter, _image(), 7, "a")
    assert counted.encoded == 1
    second = _masks(segmenter, _image(), 7, "a")
    assert counted.encoded == 1, "the second question"
    np.testing.assert_array_equal(first, second)
    _masks(segmenter, _image(seed=1), 1, "b")
    assert counted.encoded == 2, "another image"


def test_no_boxes_cost_nothing(counted: Counted) -> None:
    segmenter = counted.segmenter(EmbeddingCache(PLENTY_BYTES))
    assert list(segmenter.segment(_image(), np.empty((0, 4), np.float32), image_key="a")) == []
    assert counted.encoded == 0


def test_without_room_every_question_is_encoded(counted: Counted) -> None:
    segmenter = counted.segmenter(EmbeddingCache(0))
    for _ in range(2):
        _masks(segmenter, _image(), 1, "a")
    assert counted.encoded == 2


def test_what_is_kept_belongs_to_a_model_and_outlives_its_loading(counted: Counted) -> None:
    cache = EmbeddingCache(PLENTY_BYTES)
    for sha256, encoded in (("a" * 64, 1), ("b" * 64, 2), ("a" * 64, 2)):
        _masks(counted.segmenter(cache, sha256), _image(), 1, "a")
        assert counted.encoded == encoded


def test_a_model_is_known_by_the_sha256_of_its_file(small: Segmenter, small_checkpoint: Path) -> None:
    assert small._sha256 == hashlib.sha256(small_checkpoint.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "box",
    [(-50, -50, 500, 500), (10, 10, 10, 10), (119, 89, 120, 90), (60, 50, 20, 10), (500, 500, 600, 600)],
)
def test_odd_boxes_have_masks_too(small: Segmenter, box: tuple[float, ...]) -> None:
    (mask,) = small.segment(_image(), np.array([box], np.float32), image_key="a")
    assert mask.shape == (90, 120)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 700), (700, 1), (2000, 30)])
def test_odd_shapes_have_masks_of_their_own_shape(small: Segmenter, height: int, width: int) -> None:
    boxes = np.array([(0, 0, width, height)], np.float32)
    (mask,) = small.segment(_image(height, width), boxes, image_key="a")
    assert mask.shape == (height, width)


def test_masks_of_a_large_image_are_made_one_by_one(small: Segmenter) -> None:
    """Twelve masks of 12 megapixels: 144 MB together, and one or two of them at any time."""
    height, width = 3000, 4000
    image = np.zeros((height, width, 3), np.uint8)
    tracemalloc.start()
    seen = sum(1 for _ in small.segment(image, _boxes(12, height, width), image_key="a"))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == 12
    assert peak_bytes < 3 * height * width


def test_a_question_broken_off_leaves_the_next_one_right(small: Segmenter) -> None:
    image, boxes = _image(), _boxes(5)
    whole = list(small.segment(image, boxes, image_key="a"))
    broken: Iterator[NDArray[np.bool_]] = small.segment(image, boxes, image_key="a")
    next(broken)
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    np.testing.assert_array_equal(list(small.segment(image, boxes, image_key="a")), whole)


def test_a_fine_tuned_model_may_show_the_masks_of_boxes_alone(tmp_path: Path, small: Segmenter) -> None:
    path = sam2_files.save(tmp_path / "tuned.pt", image_px=SMALL_PX, multimask_fallback=False)
    tuned = open_segmenter(path, device="cpu", cache=None)
    masks = [_masks(each, _image(), 6, "a") for each in (tuned, small)]
    assert not np.array_equal(*masks)


def test_images_are_stretched_to_the_edge_that_the_file_was_trained_at(small: Segmenter) -> None:
    embedding = small._encode(_image())
    edges = [tensor.shape[-1] for tensor in (embedding.image, *embedding.high_resolution)]
    assert edges == [SMALL_PX // 16, SMALL_PX // 4, SMALL_PX // 8]
    assert embedding.size_bytes == sum(
        tensor.numel() * tensor.element_size() for tensor in (embedding.image, *embedding.high_resolution)
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"image_px": 2048}, "its image_px is 2048; save it with the edge"),
        ({"image_px": 0}, "its image_px is 0"),
        ({"image_px": 100}, "its image_px is 100"),
        ({"image_px": 128.0}, r"its image_px is 128\.0"),
        ({"image_px": True}, "its image_px is True"),
        ({"image_px": None}, "its image_px is None"),
        ({"image_px": "128"}, "its image_px is '128'"),
        ({"image_px": 32 * 10**600}, "its image_px is 320+…0+;"),
        ({"image_px": [128]}, "its image_px is a list"),
        ({"image_px": torch.tensor(128)}, "its image_px is a Tensor"),
        ({"multimask_fallback": 0}, "its multimask_fallback is 0; save it with True or False"),
        ({"multimask_fallback": "no"}, "its multimask_fallback is 'no'"),
    ],
)
def test_what_a_file_says_of_its_use_is_not_taken_on_trust(
    tmp_path: Path, said: dict[str, object], told: str
) -> None:
    path = sam2_files.save(tmp_path / "tuned.pt", {"model": sam2_files.hollow(), **said})
    with pytest.raises(ModelInvalidError, match=f"tuned.pt says that {told}"):
        open_segmenter(path, device="cpu", cache=None)


def test_it_says_how_large_and_how_exact_it_is(small: Segmenter) -> None:
    weights_bytes = sum(tensor.numel() * 4 for tensor in sam2_files.weights().values())
    assert weights_bytes <= small.memory_bytes < weights_bytes + (1 << 30)
    assert small.precision in {"fp32", "bf16"}


def test_what_is_no_sam2_model_is_not_opened(tmp_path: Path) -> None:
    path = sam2_files.save(tmp_path / "model.pt", {"model": {}})
    with pytest.raises(ModelInvalidError, match=r"model\.pt is a state dict of something else"):
        open_segmenter(path, device="cpu", cache=None)
