"""What is opened as SAM2, and what everything else is called."""

from __future__ import annotations

import os
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rvmcv_worker.compute import sam2_checkpoint
from rvmcv_worker.errors import ModelInvalidError
from tests import sam2_files

EXPECTED = r"expected is a SAM 2\.1 checkpoint, \{\"model\": state dict\}.*sam2\.1_hiera_large"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sam2_files.save(tmp_path_factory.mktemp("sam2") / "tiny.pt")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


def test_a_whole_checkpoint_opens_with_its_weights(tiny: Path) -> None:
    model, checkpoint = sam2_checkpoint.open_sam2(tiny)
    assert (checkpoint.architecture, checkpoint.metadata) == ("sam2.1_hiera_tiny", {})
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, sam2_files.weights()[key]), key
    assert not model.training


def test_another_architecture_in_half_precision_with_metadata_opens(path: Path) -> None:
    architecture = "sam2.1_hiera_base_plus"
    metadata = {"config": architecture, "epoch": 3, "metrics": {"miou": 0.5}}
    sam2_files.save(path, {"model": sam2_files.hollow(architecture, torch.half), **metadata})
    model, checkpoint = sam2_checkpoint.open_sam2(path)
    assert (checkpoint.architecture, checkpoint.metadata) == (architecture, metadata)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sam2_checkpoint.CONFIGS)
def test_each_architecture_is_told_by_its_tensors(architecture: str) -> None:
    model = sam2_checkpoint.build(architecture)
    assert sam2_checkpoint._architecture(dict(model.state_dict()), "model.pt") == architecture


def test_the_encoders_edge_changes_no_tensor(tiny: Path) -> None:
    model, _ = sam2_checkpoint.open_sam2(tiny, image_px=256)
    assert model.image_size == 256


def _without(*starts: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in sam2_files.hollow().items() if not key.startswith(starts)}


def _only(start: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in sam2_files.hollow().items() if key.startswith(start)}


def _with(**changed: Any) -> dict[str, Any]:
    return {**sam2_files.hollow(), **{key.replace("__", "."): value for key, value in changed.items()}}


INVALID: dict[str, tuple[Callable[[], object], str]] = {
    "bare state dict": (lambda: dict(sam2_files.hollow()), r"is a bare state dict; save it as torch\.save"),
    "ordered bare one": (lambda: OrderedDict(sam2_files.hollow()), "is a bare state dict"),
    "wrapped model": (
        lambda: {"model": {f"module.{key}": value for key, value in sam2_files.hollow().items()}},
        "has 'module.' before every name",
    ),
    "other entry": (lambda: {"state_dict": {}, "epoch": 3}, 'has no entry "model", but state_dict, epoch'),
    "empty": (dict, 'has no entry "model", but nothing'),
    "list": (lambda: [1, 2], "holds a list"),
    "a tensor": (lambda: torch.zeros(3), "holds a Tensor"),
    "model is text": (lambda: {"model": "tiny"}, 'has a str under "model"'),
    "empty model": (lambda: {"model": {}}, "a state dict of something else, with nothing in it"),
    "another network": (
        lambda: {"model": {"conv.weight": torch.zeros(3)}},
        r"a state dict of something else, with conv\.weight",
    ),
    "first SAM": (
        lambda: {"model": {"image_encoder.patch_embed.proj.weight": torch.zeros(3)}},
        "is a checkpoint of the first SAM",
    ),
    "decoder only": (lambda: {"model": _only("sam_mask_decoder.")}, "is a part .* only sam_mask_decoder"),
    "no decoder": (lambda: {"model": _without("sam_mask_decoder.")}, r"without \d+ of 471 tensors: sam_mask"),
    "one is missing": (lambda: {"model": _without("no_mem_embed")}, "without 1 of 471 tensors: no_mem_embed"),
    "SAM 2.0": (
        lambda: {"model": _without("no_obj_embed_spatial", "obj_ptr_tpos_proj.")},
        r"is a SAM 2\.0 checkpoint",
    ),
    "one too many": (
        lambda: {"model": _with(head__weight=torch.zeros(3))},
        r"tensors that sam2\.1_hiera_tiny does not have: head\.weight",
    ),
    "other shape": (
        lambda: {"model": _with(no_mem_embed=torch.zeros(1, 1, 255))},
        r"has no_mem_embed in the shape \(1, 1, 255\), but sam2\.1_hiera_tiny in \(1, 1, 256\)",
    ),
    "other trunk": (
        lambda: {"model": _without("image_encoder.trunk.blocks.11.")},
        "an encoder of 11 blocks of width 96",
    ),
    "trunk without a width": (
        lambda: {"model": {sam2_checkpoint._PATCHES: torch.tensor(1.0)}},
        "an encoder of 0 blocks of width 0",
    ),
    "whole numbers": (
        lambda: {"model": _with(no_mem_embed=torch.zeros(1, 1, 256, dtype=torch.long))},
        "holds under 'no_mem_embed' what is no tensor of floats",
    ),
    "nested": (lambda: {"model": {"a": {"b": 1}}}, "holds under 'a' what is no tensor"),
    "numbered": (lambda: {"model": {7: torch.zeros(1)}}, "holds under '7' what is no tensor"),
    "without storage": (
        lambda: {"model": _with(no_mem_embed=torch.zeros(1, 1, 256, device="meta"))},
        r"holds more than tensors: torch\._utils\._rebuild_meta_tensor_no_storage",
    ),
    "whole module": (
        lambda: {"model": torch.nn.Linear(2, 2)},
        r"holds more than tensors: builtins\.set, torch\.nn\.modules\.linear\.Linear",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_what_is_something_else_is_called_by_its_name(path: Path, case: str) -> None:
    content, message = INVALID[case]
    sam2_files.save(path, content())
    with pytest.raises(ModelInvalidError, match=message) as error:
        sam2_checkpoint.open_sam2(path)
    assert error.match(EXPECTED)
    assert str(path.parent) not in error.value.message


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(path: Path, number: float) -> None:
    embed = sam2_files.hollow()["no_mem_embed"].clone()
    embed[0, 0, 255] = number
    sam2_files.save(path, {"model": _with(no_mem_embed=embed)})
    with pytest.raises(ModelInvalidError, match="not finite, in no_mem_embed: its training diverged"):
        sam2_checkpoint.open_sam2(path)


@pytest.mark.parametrize(
    "config", ["sam2.1_hiera_large", "configs/sam2.1/sam2.1_hiera_t.yaml", {"_target_": "os.system"}, 3, None]
)
def test_a_config_that_does_not_agree_is_refused(path: Path, config: object) -> None:
    sam2_files.save(path, {"model": sam2_files.hollow(), "config": config})
    with pytest.raises(ModelInvalidError, match=r"says that its config is .* those of sam2\.1_hiera_tiny"):
        sam2_checkpoint.open_sam2(path)


def test_a_yolo_checkpoint_is_called_one(shared: Path, path: Path) -> None:
    shutil.copyfile(shared / "models" / "pet_hdpe_yolo11n.pt", path)
    with pytest.raises(ModelInvalidError, match=r"model\.pt is an Ultralytics checkpoint") as error:
        sam2_checkpoint.open_sam2(path)
    assert error.match(EXPECTED)


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(path: Path) -> None:
    marker = path.parent / "marker"
    sam2_files.save(path, {"model": sam2_files.hollow(), "extra": Attack(marker)})
    with pytest.raises(ModelInvalidError, match=r"would run code when opened: its pickle names posix\.mkdir"):
        sam2_checkpoint.open_sam2(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the attack is none: this test shows nothing"


def test_files_that_are_no_checkpoint_or_damaged_are_refused(path: Path) -> None:
    whole = sam2_files.save(path, {"model": sam2_files.hollow()}).read_bytes()
    dice = random.Random(1)
    cut = [whole[: dice.randrange(len(whole))] for _ in range(5)]
    for content in (b"", b"PK\x03\x04", b"no model", *cut):
        path.write_bytes(content)
        with pytest.raises(ModelInvalidError):
            sam2_checkpoint.open_sam2(path)
    with pytest.raises(ModelInvalidError, match="is not a file"):
        sam2_checkpoint.open_sam2(path.with_name("missing.pt"))


def test_a_damaged_pickle_is_refused_or_means_the_same(path: Path) -> None:
    """Bytes changed in the part that is parsed: nothing but the one error comes out."""
    whole = sam2_files.save(path, {"model": sam2_files.hollow()}).read_bytes()
    start = whole.index(b"data.pkl") + 8
    dice = random.Random(2)
    refused = 0
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[start + dice.randrange(20_000)] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            sam2_checkpoint.read(path)
        except ModelInvalidError:
            refused += 1
    assert refused > 10
