"""The best.pt of a SAM2 training, as others load it and as we do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sam2.modeling.sam2_base import SAM2Base

from rvmcv_worker.compute import pickle_scan, sam2_checkpoint, sam2_publish
from tests import sam2_files, sam2_predictor

ARCHITECTURE = "sam2.1_hiera_tiny"


@pytest.fixture(scope="module")
def model() -> SAM2Base:
    """A model that has learnt something: its weights are not those that any seed makes."""
    model = sam2_checkpoint.build(ARCHITECTURE, image_px=sam2_predictor.EDGE_PX)
    model.load_state_dict({key: tensor * 1.01 for key, tensor in sam2_files.weights().items()})
    return model


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory, model: SAM2Base) -> Path:
    path = tmp_path_factory.mktemp("published") / "best.pt"
    sam2_publish.write(path, model, sam2_files.METADATA)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # the predictor's own
def test_another_process_loads_it_with_sam2_alone_and_its_masks_are_the_same(
    tmp_path: Path, model: SAM2Base, best: Path
) -> None:
    config, target = sam2_checkpoint.CONFIGS[ARCHITECTURE], tmp_path / "logits.npy"
    command = [sys.executable, "-m", "tests.sam2_predictor", config, str(best), str(target)]
    root = Path(__file__).parents[2]
    # Sums over more threads differ in their last bits, and other tests have changed how many there are here.
    env, threads = {**os.environ, "OMP_NUM_THREADS": "1"}, torch.get_num_threads()
    child = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    torch.set_num_threads(1)
    try:
        before = sam2_predictor.logits(model)
    finally:
        torch.set_num_threads(threads)
    printed, _ = child.communicate(timeout=120)

    assert child.returncode == 0, printed.decode()
    np.testing.assert_array_equal(np.load(target), before)
    assert 0 < (before > 0).mean() < 1, "masks of everything or nothing would show little"


def test_we_open_it_with_all_that_it_says_of_itself(model: SAM2Base, best: Path) -> None:
    opened, checkpoint = sam2_checkpoint.open_sam2(best)

    for key, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], tensor), key
    assert checkpoint.metadata == sam2_files.METADATA
    assert (opened.image_size, opened.sam_mask_decoder.dynamic_multimask_via_stability) == (128, False)


def test_it_may_be_the_base_of_another_training_with_another_edge(best: Path) -> None:
    opened, checkpoint = sam2_checkpoint.open_sam2(best, image_px=256, multimask_fallback=True)
    assert (opened.image_size, opened.sam_mask_decoder.dynamic_multimask_via_stability) == (256, True)
    assert checkpoint.architecture == ARCHITECTURE


def test_equal_models_make_equal_files_wherever_they_lie(tmp_path: Path, model: SAM2Base, best: Path) -> None:
    again = tmp_path / "under" / "another-name.pt"
    again.parent.mkdir()
    metadata = json.loads(json.dumps(sam2_files.METADATA))  # equal, and other objects
    sam2_publish.write(again, model, metadata)
    assert again.read_bytes() == best.read_bytes()


def test_every_tensor_has_a_storage_of_its_own_in_fp32(tmp_path: Path) -> None:
    """Whatever the model had: views of one large buffer, halves, rows that lie in columns."""
    model = sam2_checkpoint.build(ARCHITECTURE)
    decoder = model.sam_mask_decoder
    decoder.iou_token.weight.data = torch.randn(100, 256)[7:8]
    decoder.mask_tokens.weight.data = torch.randn(256, 4).T
    decoder.obj_score_token.weight.data = torch.randn(1, 256).half()
    path = tmp_path / "best.pt"
    sam2_publish.write(path, model, sam2_files.METADATA)

    stored = torch.load(path, weights_only=True)["model"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(stored[key], tensor.float()), key
        assert (stored[key].dtype, stored[key].is_contiguous()) == (torch.float32, True), key
    pointers = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
    own_bytes = sum(tensor.untyped_storage().nbytes() for tensor in stored.values())
    assert len(pointers) == len(stored)
    assert own_bytes == 4 * sum(tensor.numel() for tensor in stored.values())


def test_it_names_nothing_but_tensors_and_no_place(best: Path) -> None:
    found = pickle_scan.scan(best)
    assert (found.beyond(pickle_scan.SAM2_TYPES), found.local_paths) == ([], [])


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, model: SAM2Base) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(b"the one before")
    path.with_name("best.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        sam2_publish.write(path, model, sam2_files.METADATA)
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_nearly_plain_becomes_plain(tmp_path: Path) -> None:
    metrics = {"miou": float("nan"), "best": np.float64(0.5)}
    versions, classes = {"torch": torch.__version__}, ["half a \ud83d", "瓶"]
    metadata = sam2_files.METADATA | {"metrics": metrics, "versions": versions, "classes": classes}
    path = tmp_path / "best.pt"
    sam2_publish.write(path, sam2_checkpoint.build(ARCHITECTURE), metadata)
    written = sam2_checkpoint.read(path).metadata
    assert written["classes"] == classes
    assert written["metrics"] == {"miou": None, "best": 0.5}
    assert written["versions"] == {"torch": str(torch.__version__)}
    assert pickle_scan.scan(path).beyond(pickle_scan.SAM2_TYPES) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_px": 100},
        {"classes": "bottle"},
        {"trained": "encoder"},
        {"more": 1},
        {"metrics": {"a": object()}},
    ],
)
def test_what_is_no_metadata_is_not_written(tmp_path: Path, model: SAM2Base, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        sam2_publish.write(tmp_path / "best.pt", model, sam2_files.METADATA | wrong)
    assert not list(tmp_path.iterdir())
