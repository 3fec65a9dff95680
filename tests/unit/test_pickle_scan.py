from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker.compute import check_model, pickle_scan, yolo11_train
from rvmcv_worker.compute.child import Child
from rvmcv_worker.errors import ModelInvalidError


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def checkpoint(path: Path, content: object, *, protocol: int = 2, **extra: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("best/data.pkl", pickle.dumps(content, protocol=protocol))
        archive.writestr("best/version", b"3\n")
        archive.writestr("best/data/0", b"\x00" * 64)
        for name, data in extra.items():
            archive.writestr(f"best/{name}", data)
    return path


@pytest.fixture
def child(tmp_path: Path) -> Child:
    (tmp_path / "in").mkdir()
    (tmp_path / "train").mkdir()
    return Child(root=tmp_path, directory=tmp_path / "train", progress_fd=-1)


def test_names_and_text_of_a_harmless_pickle_are_found(tmp_path: Path) -> None:
    found = pickle_scan.scan(checkpoint(tmp_path / "a.pt", OrderedDict(model={"k"}, where="/home/anna/run")))

    assert found.types == {"collections.OrderedDict", "builtins.set"}
    assert (found.dangerous, found.beyond(pickle_scan.YOLO11_TYPES), found.local_paths) == (
        [],
        [],
        ["/home/anna/run"],
    )


@pytest.mark.parametrize(
    "text", ["https://docs.ultralytics.com", "metrics/mAP50-95(B)", "glass/plastic", "data.yaml", "lr/pg0"]
)
def test_text_that_is_no_path_is_not_taken_for_one(tmp_path: Path, text: str) -> None:
    assert pickle_scan.scan(checkpoint(tmp_path / "a.pt", {"text": text})).local_paths == []


@pytest.mark.parametrize(
    "text", ["/job/train/run", "C:\\Users\\anna", "~/x", "file:///x", "see /home/anna/x"]
)
def test_paths_of_a_machine_are_found(tmp_path: Path, text: str) -> None:
    assert pickle_scan.scan(checkpoint(tmp_path / "a.pt", {"text": text})).local_paths == [text]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("task", [yolo11_train, check_model])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(child: Child, task: Any, protocol: int) -> None:
    marker = child.root / "marker"
    good_looking = {"model": None, "train_args": {}, "extra": Attack(marker)}
    checkpoint(child.root / "in" / "base.pt", good_looking, protocol=protocol)
    job = {"model": "in/base.pt", "label_task": "detect", "origin": "base"}

    with pytest.raises(ModelInvalidError, match=r"base\.pt (would run code|was not written by torch)"):
        task.run(job, child)
    assert not marker.exists()
    with zipfile.ZipFile(child.root / "in" / "base.pt") as archive:
        pickle.loads(archive.read("best/data.pkl"))
    assert marker.exists(), "the attack is none: this test shows nothing"


def damaged(path: Path, kind: str) -> Path:
    content = checkpoint(path, {"model": None, "filler": "x" * 10_000}).read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps({"model": None}))
    elif kind == "flipped bits":
        path.write_bytes(content.replace(b"xxxx", b"xxyx", 1))
    elif kind == "data set":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images/train/1.jpg", b"x")
    elif kind == "TorchScript":
        checkpoint(path, {"model": None}, **{"constants.pkl": b"x"})
    elif kind == "comment":
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b"PK"
    elif kind == "rubbish inside":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("best/data.pkl", b"\x00\x01 no pickle")
    elif kind == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("best/data.pkl", pickle.dumps({"model": None}, protocol=2))
    return path


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("truncated", "truncated or damaged"),
        ("flipped bits", "truncated or damaged"),
        ("rubbish inside", "truncated or damaged"),
        ("empty", "does not begin like one"),
        ("picture", "does not begin like one"),
        ("bare pickle", "does not begin like one"),
        ("data set", "images/train/1.jpg"),
        ("TorchScript", "constants.pkl"),
        ("compressed", "not written by torch.save"),
        ("comment", "not written by torch.save"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(child: Child, kind: str, told: str) -> None:
    damaged(child.root / "in" / "base.pt", kind)

    with pytest.raises(ModelInvalidError, match=told) as refusal:
        yolo11_train.run({"model": "in/base.pt", "label_task": "detect"}, child)
    assert "base.pt" in refusal.value.message


def test_two_pickles_in_one_archive_are_refused(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "a.pt", {"model": None})
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("best/data.pkl", pickle.dumps(Attack(tmp_path / "marker"), protocol=2))

    with pytest.raises(ModelInvalidError, match="nothing twice"):
        pickle_scan.scan(file)


def test_a_missing_base_model_is_refused(child: Child) -> None:
    with pytest.raises(ModelInvalidError, match=r"base\.pt is not a file"):
        yolo11_train.run({"model": "in/base.pt", "label_task": "detect"}, child)


@pytest.mark.parametrize("model", ["yolo11n-seg.yaml", "yolov8n.yaml", "in/own.yaml"])
def test_an_architecture_that_is_not_on_the_list_is_refused(child: Child, model: str) -> None:
    with pytest.raises(ModelInvalidError, match=r"known are yolo11n\.yaml"):
        yolo11_train.run({"model": model, "label_task": "detect"}, child)


def test_a_model_to_publish_may_name_no_path(child: Child) -> None:
    checkpoint(child.root / "in" / "candidate.pt", {"train_args": {"data": "/srv/anna/data.yaml"}})

    with pytest.raises(ModelInvalidError, match=r"/srv/anna/data\.yaml"):
        check_model.run({"model": "in/candidate.pt", "label_task": "detect"}, child)


def test_a_model_to_publish_may_name_only_types_of_our_trainings(child: Child) -> None:
    checkpoint(child.root / "in" / "candidate.pt", {"model": Path("x")})

    with pytest.raises(ModelInvalidError, match=r"pathlib\.PosixPath: no YOLO11 training"):
        check_model.run({"model": "in/candidate.pt", "label_task": "detect"}, child)
