"""SAM2 models before they are published: good ones, and all that a hostile or broken training could leave."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rvmcv_worker.compute import check_model, sam2_checkpoint, sam2_publish
from rvmcv_worker.compute.child import Child, StopRequestedError
from rvmcv_worker.errors import ModelInvalidError
from tests import sam2_files
from tests.compute_child import ComputeChild

JOB = {"task": "check_model", "model_type": "sam2", "model": "in/candidate.pt", "label_task": "segment"}
CLASSES = ["bottle", "can"]


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "candidate.pt"
    path.parent.mkdir()
    return path


def check(candidate: Path, **job: Any) -> dict[str, Any]:
    root = candidate.parents[1]
    expect = {"task": "segment", "names": CLASSES}
    return check_model.run({**JOB, "expect": expect, **job}, Child(root, root / "check", progress_fd=-1))


def content(**changed: Any) -> dict[str, Any]:
    """Return what a training writes, with weights of zeros that take no room."""
    return {"model": sam2_files.hollow(), **sam2_files.METADATA, **changed}


@pytest.mark.slow
def test_the_check_child_knows_what_a_training_wrote(tmp_path: Path, candidate: Path) -> None:
    model = sam2_checkpoint.build("sam2.1_hiera_tiny")
    sam2_publish.write(candidate, model, sam2_files.METADATA)
    expect = {"task": "segment", "names": CLASSES, "architecture": "sam2.1_hiera_tiny"}
    child = ComputeChild(tmp_path, "check", {**JOB, "expect": expect})
    result = child.finish()["result"]

    assert len(result.pop("sha256")) == 64
    assert result == {
        "ok_types": True,
        "task": "segment",
        "architecture": "sam2.1_hiera_tiny",
        "parameters": sum(tensor.numel() for tensor in sam2_files.weights().values()),
        "names": CLASSES,
        "image_px": 128,
        "size_bytes": candidate.stat().st_size,
    }
    assert not [line for line in child.watched_file.read_text().splitlines() if "ldconfig" not in line]


def test_a_base_model_made_elsewhere_passes_as_a_base(candidate: Path) -> None:
    sam2_files.save(candidate, {"model": sam2_files.hollow(dtype=torch.half), "author": "/home/anna"})
    facts = check(candidate, origin="base")
    assert (facts["architecture"], facts["task"], "names" in facts) == ("sam2.1_hiera_tiny", "segment", False)


def test_a_class_may_look_like_a_path(candidate: Path) -> None:
    classes = ["/home/anna", "can"]
    sam2_files.save(candidate, content(classes=classes))
    assert check(candidate, expect={"names": classes})["names"] == classes


def test_a_machine_may_be_called_like_what_we_write(candidate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "box")
    monkeypatch.setenv("LOGNAME", "sam2")
    verdict = "better than the base model on val, but not than the box itself"
    sam2_files.save(candidate, content(metrics={"verdict": verdict}, base_model="sam2.1_hiera_tiny"))
    assert check(candidate)["ok_types"] is True
    sam2_files.save(candidate, content(metrics={"by": "box"}))
    with pytest.raises(ModelInvalidError, match="names the machine or the user"):
        check(candidate)


def test_it_stops_when_it_is_asked_to(candidate: Path) -> None:
    sam2_files.save(candidate, content())
    child = Child(candidate.parents[1], candidate.parent, progress_fd=-1)
    child.stop_requested.set()
    with pytest.raises(StopRequestedError):
        check_model.run(JOB, child)


def _nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def _cyclic() -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    metrics["itself"] = metrics
    return metrics


def _with(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**sam2_files.hollow(), key: tensor}


def _without(key: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in sam2_files.hollow().items() if name != key}


def _meta_only() -> dict[str, Any]:
    return {"model": sam2_files.hollow()}


def _overflowing() -> dict[str, torch.Tensor]:
    """Every number is finite, but not what comes of them."""
    return {key: torch.tensor(1e30).expand(tensor.shape) for key, tensor in sam2_files.hollow().items()}


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "a set": (lambda: content(metrics={"a": {1, 2}}), r"names builtins\.set: no SAM2 training writes that"),
    "a number of NumPy's": (lambda: content(metrics={"miou": np.float64(1)}), "no SAM2 training writes that"),
    "halves": (lambda: content(model=sam2_files.hollow(dtype=torch.half)), r"names torch\.HalfStorage"),
    "a parameter": (
        lambda: content(model=_with("no_mem_embed", torch.nn.Parameter(torch.zeros(1, 1, 256)))),
        "_rebuild_parameter: no SAM2 training",
    ),
    "whole numbers": (lambda: content(counts=torch.zeros(3, dtype=torch.long)), r"names torch\.LongStorage"),
    "a path": (lambda: content(base_model="/work/base.pt"), "holds paths of the machine .*'/work/base.pt'"),
    "a path deep inside": (
        lambda: content(metrics={"per_class": [{"note": "see /home/anna/run"}]}),
        "holds paths of the machine",
    ),
    "a path as a key": (lambda: content(versions={"C:\\Users\\anna": "1"}), "holds paths of the machine"),
    "a path for a tensor": (
        lambda: content(model={**sam2_files.hollow(), "/tmp/x": torch.zeros(1)}),
        "holds paths of the machine",
    ),
    "no metadata": (_meta_only, "is not as a SAM2 training of ours writes it: config: Field required"),
    "another entry": (lambda: content(optimizer={}), "optimizer: Extra inputs are not permitted"),
    "a tensor beside": (lambda: content(ema=torch.zeros(3)), "ema: Extra inputs are not permitted"),
    "a number for a name": (lambda: {**content(), 7: "seven"}, "7: Extra inputs are not permitted"),
    "a tensor among the metrics": (lambda: content(metrics={"a": torch.zeros(3)}), r"metrics\.a"),
    "an odd edge": (lambda: content(image_px=100), r"its image_px is 100"),
    "an edge of text": (lambda: content(image_px="128"), "its image_px is '128'"),
    "an odd fallback": (lambda: content(multimask_fallback=1), "its multimask_fallback is 1"),
    "an odd sha256": (lambda: content(base_sha256="AB" * 32), "base_sha256: String should match"),
    "another config": (lambda: content(config="sam2.1_hiera_large"), "says that its config is"),
    "other classes": (lambda: content(classes=["can", "bottle"]), r"the classes \['can', 'bottle'\], not"),
    "nested without end": (lambda: content(metrics={"a": _nested(400)}), "metrics"),
    "in itself": (lambda: content(metrics=_cyclic()), "metrics"),
    "too much": (lambda: content(metrics={"a": "x" * 17_000_000}), r"bytes as JSON, more than 16777216"),
    "a part": (lambda: content(model=_without("no_mem_embed")), "without 1 of 471 tensors"),
    "one too many": (
        lambda: content(model=_with("head", torch.zeros(3))),
        "tensors that .* does not have: head",
    ),
    "not finite": (
        lambda: content(model=_with("no_mem_embed", torch.full((1, 1, 256), torch.nan))),
        "numbers that are not finite, in no_mem_embed",
    ),
    "overflowing": (lambda: content(model=_overflowing()), "computes numbers that are not finite"),
    "a bare state dict": (lambda: OrderedDict(sam2_files.hollow()), "is a bare state dict"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_training_of_ours_leaves_is_refused(candidate: Path, case: str) -> None:
    made, told = HOSTILE[case]
    sam2_files.save(candidate, made())
    with pytest.raises(ModelInvalidError, match=told) as error:
        check(candidate)
    assert str(candidate.parent) not in error.value.message
    assert len(error.value.message) < 1000


def test_another_architecture_than_was_trained_is_refused(candidate: Path) -> None:
    sam2_files.save(candidate, content())
    with pytest.raises(
        ModelInvalidError, match=r"the architecture sam2\.1_hiera_tiny, not sam2\.1_hiera_small"
    ):
        check(candidate, expect={"architecture": "sam2.1_hiera_small"})


def test_more_bytes_than_the_tensors_need_are_refused(candidate: Path) -> None:
    """A view of a larger buffer is saved with all of it."""
    large = torch.zeros(50_000_000)
    shapes = {key: tensor.shape for key, tensor in sam2_files.hollow().items()}
    weights = {key: large[: shape.numel()].reshape(shape) for key, shape in shapes.items()}
    sam2_files.save(candidate, content(model=weights))
    with pytest.raises(ModelInvalidError, match=r"has \d+ bytes, but its tensors need 155851016"):
        check(candidate)


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("origin", ["trained", "base"])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(candidate: Path, origin: str) -> None:
    marker = candidate.with_name("marker")
    sam2_files.save(candidate, content(metrics={"miou": Attack(marker)}))
    with pytest.raises(ModelInvalidError, match=r"would run code when opened: its pickle names posix\.mkdir"):
        check(candidate, origin=origin)
    assert not marker.exists()


def test_files_of_another_kind_are_refused(candidate: Path, shared: Path) -> None:
    shutil.copyfile(shared / "models" / "pet_hdpe_yolo11n.pt", candidate)
    with pytest.raises(ModelInvalidError, match="no SAM2 training writes that"):
        check(candidate)
    with pytest.raises(ModelInvalidError, match="is an Ultralytics checkpoint"):
        check(candidate, origin="base")
    candidate.write_bytes(candidate.read_bytes()[:-1000])
    with pytest.raises(ModelInvalidError, match="truncated or damaged"):
        check(candidate)
