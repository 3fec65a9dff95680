"""Checkpoints of SAM2 trainings that were tampered with, or are of another training."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from rvmcv_worker.compute import checkpoint_file, sam2_checkpoint, sam2_kept, sam2_optimizer
from rvmcv_worker.compute.checkpoint_file import CheckpointError, Run, State
from rvmcv_worker.compute.sam2_kept import Course
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.compute.sam2_score import Score
from rvmcv_worker.errors import ModelInvalidError
from rvmcv_worker.sam2_options import Sam2Options
from tests.sam2_jobs import NAMES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=64), "decoder", torch.device("cpu"))


@pytest.fixture(scope="module")
def kept(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint of `network` after an epoch of two, unpacked."""
    folder = tmp_path_factory.mktemp("kept")
    score = Score(0.5, 0.4, 0.3, 1, 0, {})
    course = Course(score, score).after({"epoch": 1}, score)
    trained = sam2_kept.copy(network)
    optimizer = sam2_optimizer.optimizer(network, Sam2Options(), 1e-4)
    torch.save(
        {
            "trained": trained,
            "optimizer": optimizer.state_dict()["state"],
            "course": asdict(course),
            "setup": SETUP,
        },
        folder / "last.pt",
    )
    torch.save({"trained": trained, "epoch": 1}, folder / "best.pt")
    return folder


SETUP = {"base model": "a" * 64, "train": "decoder", "imgsz": 64, "classes": NAMES}


class _Evil:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (self.marker, 0o700)


def _change(folder: Path, name: str, **changed: Any) -> None:
    torch.save({**torch.load(folder / name, weights_only=True), **changed}, folder / name)


def _poison(folder: Path) -> None:
    trained = torch.load(folder / "last.pt", weights_only=True)["trained"]
    next(iter(trained.values())).fill_(float("nan"))
    _change(folder, "last.pt", trained=trained)


def _shrink(folder: Path) -> None:
    optimizer = torch.load(folder / "last.pt", weights_only=True)["optimizer"]
    optimizer[0]["exp_avg"] = torch.zeros(3)
    _change(folder, "last.pt", optimizer=optimizer)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            lambda folder: _change(folder, "last.pt", setup={**SETUP, "train": "all"}),
            "another train: all, not",
        ),
        (lambda folder: _change(folder, "last.pt", setup={**SETUP, "classes": ["x"]}), "another classes"),
        (
            lambda folder: _change(folder, "last.pt", setup={**SETUP, "imgsz": 96}),
            "another imgsz: 96, not 64",
        ),
        (lambda folder: _change(folder, "last.pt", setup=None), "does not say what was trained"),
        (lambda folder: _change(folder, "last.pt", course={"base": 1}), "course cannot be read"),
        (lambda folder: _change(folder, "last.pt", trained={}), "does not hold the parameters"),
        (lambda folder: _change(folder, "best.pt", epoch=2), "best.pt is of epoch 2, not 1"),
        (lambda folder: (folder / "best.pt").unlink(), "has no best.pt"),
        (lambda folder: torch.save([1], folder / "last.pt"), "holds a list"),
        (lambda folder: os.truncate(folder / "last.pt", 100_000), "last.pt"),
        (_poison, "is not finite"),
        (_shrink, "has another shape"),
        (lambda folder: torch.save({"x": _Evil(f"{folder}/it-ran")}, folder / "last.pt"), "would run code"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_not_gone_on_from(
    fault: Callable[[Path], Any], said: str, kept: Path, network: Network, tmp_path: Path
) -> None:
    folder, output = tmp_path / "kept", tmp_path / "run"
    shutil.copytree(kept, folder)
    output.mkdir()
    fault(folder)
    state = State(epochs=1, runs=(Run(1, 1),))
    checkpoint_file.write(tmp_path, state, {file.name: file for file in folder.iterdir()})
    optimizer = sam2_optimizer.optimizer(network, Sam2Options(), 1e-4)
    before = sam2_kept.copy(network)

    with pytest.raises((CheckpointError, ModelInvalidError), match=said):
        sam2_kept.restore(tmp_path / "checkpoint-1.tar", output, network, optimizer, SETUP, 2)
    assert all(torch.equal(each, before[name]) for name, each in network.trained_parameters().items())
    assert not (folder / "it-ran").exists()


def test_a_checkpoint_that_fits_is_gone_on_from(kept: Path, network: Network, tmp_path: Path) -> None:
    state = State(epochs=1, runs=(Run(1, 1),))
    checkpoint_file.write(tmp_path, state, {file.name: file for file in kept.iterdir()})
    optimizer = sam2_optimizer.optimizer(network, Sam2Options(), 1e-4)
    (tmp_path / "run").mkdir()
    file = tmp_path / "checkpoint-1.tar"

    left_off = sam2_kept.restore(file, tmp_path / "run", network, optimizer, SETUP, 2)
    assert left_off.state == state
    held = weakref.ref(next(iter(left_off._trained.values())))
    left_off.apply(network, optimizer)
    assert held() is None  # as long as the training lasts, it would be a model's worth of memory
    (tmp_path / "again").mkdir()
    with pytest.raises(CheckpointError, match=r"it is of epoch 1 .* of 1"):
        sam2_kept.restore(file, tmp_path / "again", network, optimizer, SETUP, 1)
