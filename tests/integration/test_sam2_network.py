"""SAM2's stages, against the segmenter that serves it and the `sam2` package's own predictor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch import Tensor

from rvmcv_worker.compute import sam2_checkpoint, sam2_square
from rvmcv_worker.compute.embedding_cache import Embedding
from rvmcv_worker.compute.sam2_network import Features, Network, Prompts, frozen_shapes
from rvmcv_worker.compute.segmenter import Segmenter
from rvmcv_worker.sam2_options import Trained
from tests import sam2_files

PX = 128
CPU = torch.device("cpu")
MODES: tuple[Trained, ...] = ("decoder", "decoder+neck", "all")


@pytest.fixture(scope="module")
def model() -> SAM2Base:
    model = sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=PX)
    model.load_state_dict(sam2_files.weights())
    return model


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    """An equal model as it is served, in fp32 as it is trained on a CPU."""
    served = sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=PX)
    served.load_state_dict(sam2_files.weights())
    segmenter = Segmenter(served, "0" * 64, device=CPU, cache=None)
    segmenter.precision = "fp32"
    return segmenter


def _image(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (PX, PX, 3), dtype=np.uint8)


def _squares(*seeds: int) -> Tensor:
    return torch.stack([sam2_square.square(_image(seed), PX, CPU) for seed in seeds])


def _boxes(count: int) -> Prompts:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(3)).sort(1).values * PX
    return Prompts(corners, torch.tensor((2, 3), dtype=torch.int32).expand(count, 2))


def _fields(embedding: Embedding) -> Features:
    return Features(embedding.image, *embedding.high_resolution)


@pytest.mark.parametrize("trained", MODES)
def test_features_are_what_is_served(model: SAM2Base, segmenter: Segmenter, trained: Trained) -> None:
    served = _fields(segmenter._encode(_image()))
    network = Network(model, trained, CPU)
    frozen = network.frozen(_squares(0))
    features = network.features(frozen)
    for ours, theirs in zip(features, served, strict=True):
        assert ours.dtype is torch.float32
        rounded = theirs.half().float() if trained == "decoder" else theirs
        tolerance = 2e-3 if trained == "decoder+neck" else 0  # a sum of what was rounded
        torch.testing.assert_close(ours.detach(), rounded, atol=tolerance, rtol=tolerance)
    assert [each.requires_grad for each in features] == [trained != "decoder"] * 3


@pytest.mark.parametrize("trained", MODES)
def test_frozen_output_has_the_shapes_that_are_told_before(model: SAM2Base, trained: Trained) -> None:
    network = Network(model, trained, CPU)
    frozen = network.frozen(_squares(0, 1))
    if trained == "all":
        assert frozen_shapes(trained, model, PX) == []
        torch.testing.assert_close(frozen, (_squares(0, 1),), atol=0, rtol=0)
        return
    assert [tuple(each.shape[1:]) for each in frozen] == frozen_shapes(trained, model, PX)
    for each in frozen:
        assert each.dtype is torch.float16
        assert each.is_contiguous()
        assert not each.is_inference()
        assert not each.requires_grad


def test_frozen_output_stays_within_fp16(model: SAM2Base) -> None:
    network = Network(model, "decoder", CPU)
    bias = model.sam_mask_decoder.conv_s0.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(1e6)
        frozen = network.frozen(_squares(0))
        bias.copy_(before)
    assert all(each.isfinite().all() for each in frozen)


def test_boxes_are_decoded_as_they_are_served(model: SAM2Base, segmenter: Segmenter) -> None:
    network = Network(model, "decoder", CPU)
    network.eval()
    features = network.features(network.frozen(_squares(0)))
    prompts = _boxes(5)
    with torch.no_grad():
        decoded = network.decode(features, torch.zeros(5, dtype=torch.int64), prompts, multimask=False)
    served = segmenter._decode(Embedding(features.image, (features.fine, features.middle)), prompts.points)
    torch.testing.assert_close(decoded.logits[:, 0], served, atol=1e-5, rtol=0)
    assert decoded.ious.shape == decoded.object_score.shape == (5, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # the predictor's own
@pytest.mark.parametrize("multimask", [True, False])
def test_a_click_is_decoded_as_by_the_packages_predictor(
    model: SAM2Base, segmenter: Segmenter, multimask: bool
) -> None:
    network = Network(model, "all", CPU)  # nothing is rounded to fp16
    network.eval()
    predictor = SAM2ImagePredictor(segmenter._model)
    predictor._bb_feat_sizes = [(PX // down, PX // down) for down in (4, 8, 16)]  # those of 1024 px
    predictor.set_image(np.ascontiguousarray(_image()[..., ::-1]))
    _, ious, logits = predictor.predict(
        np.array([[50.0, 70.0]]), np.array([1]), multimask_output=multimask, return_logits=True
    )

    prompts = Prompts(torch.tensor([[[50.0, 70.0]]]), torch.ones(1, 1, dtype=torch.int32))
    with torch.no_grad():
        features = network.features(network.frozen(_squares(0)))
        decoded = network.decode(features, torch.zeros(1, dtype=torch.int64), prompts, multimask=multimask)
    torch.testing.assert_close(decoded.logits[0].clamp(-32, 32), torch.from_numpy(logits), atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded.ious[0], torch.from_numpy(ious), atol=1e-6, rtol=0)


def test_objects_of_several_images_are_decoded_as_those_of_one(model: SAM2Base) -> None:
    network = Network(model, "decoder", CPU)
    features = network.features(network.frozen(_squares(0, 1, 2)))
    image_of, prompts = torch.tensor([2, 0, 2, 1]), _boxes(4)
    prompts = prompts._replace(
        logits=torch.randn(4, 1, PX // 4, PX // 4, generator=torch.Generator().manual_seed(0))
    )
    with torch.no_grad():
        mixed = network.decode(features, image_of, prompts, multimask=False)
        for number, image in enumerate(image_of):
            alone = Prompts(*(each[number : number + 1] for each in prompts if each is not None))
            single = network.decode(features, image[None], alone, multimask=False)
            for ours, theirs in zip(mixed, single, strict=True):
                torch.testing.assert_close(ours[number], theirs[0], atol=1e-5, rtol=1e-5)


def test_a_training_decodes_the_boxs_own_mask(model: SAM2Base) -> None:
    """When it is served, an unstable one is replaced; which is why the two differ."""
    network = Network(model, "decoder", CPU)
    features = network.features(network.frozen(_squares(0)))
    image_of, prompts = torch.zeros(6, dtype=torch.int64), _boxes(6)
    masks = []
    for mode in (network.train, network.eval):
        mode()
        with torch.no_grad():
            masks.append(network.decode(features, image_of, prompts, multimask=False).logits)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("trained", MODES)
def test_what_learns(model: SAM2Base, trained: Trained) -> None:
    network = Network(model, trained, CPU)
    names = set(network.trained_parameters())
    assert {name for name, each in model.named_parameters() if each.requires_grad} == names
    parts = {".".join(name.split(".")[:2]) for name in names if not name.startswith("sam_prompt")}
    assert ("image_encoder.trunk" in parts) == (trained == "all")
    assert ("image_encoder.neck" in parts) == (trained != "decoder")
    assert ("sam_mask_decoder.conv_s0" in parts) == (trained != "decoder")
    assert "sam_prompt_encoder.no_mask_embed.weight" in names
    assert "sam_mask_decoder.mask_tokens.weight" in names
    assert not [name for name in names if name.startswith(("memory_", "no_", "obj_ptr", "mask_downsample"))]
