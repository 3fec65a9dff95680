"""What was chosen for a model is kept with its files, and never believed when it has changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker import model_exports
from rvmcv_worker.engine_wire import Backend
from rvmcv_worker.errors import JobCrashedError, ModelUnavailableError
from rvmcv_worker.model_exports import Choice, Key, ModelExports
from rvmcv_worker.model_store import ModelStore

ONNX = b"a network" * 1000


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def exports(store: Path) -> ModelExports:
    return ModelExports(store)


@pytest.fixture
def key() -> Key:
    return Key("ab" * 32, "a CPU, 2 cores", 640, ("openvino", "torch-cpu"), {"torch": "2.15"})


def answer(content: bytes = ONNX, **changed: Any) -> dict[str, Any]:
    return {
        "chosen": {"backend": "openvino", "precision": "bf16"},
        "files": [
            {
                "name": "model.onnx",
                "size_bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        ],
        "measured": {"openvino bf16": {"ms": 12.5, "parity": True, "worst": {"score": 0.01}}},
        "imgsz": 640,
        **changed,
    }


def save(exports: ModelExports, key: Key, tmp_path: Path, content: bytes = ONNX) -> Choice:
    source = tmp_path / "from-the-child"
    source.write_bytes(content)
    choice = Choice.parse(answer())
    exports.save(key, choice, lambda _file: source)
    return choice


def test_a_choice_is_found_again_and_placed(exports: ModelExports, key: Key, tmp_path: Path) -> None:
    assert exports.find(key) is None
    choice = save(exports, key, tmp_path)

    assert exports.find(key) == choice
    backend = exports.place(key, choice, tmp_path / "engine")
    assert backend == Backend("openvino", "bf16", str(tmp_path / "engine" / "model.onnx"))
    assert (tmp_path / "engine" / "model.onnx").read_bytes() == ONNX
    assert exports.place(key, choice, tmp_path / "engine") == backend


def test_torch_needs_no_files(exports: ModelExports, key: Key, tmp_path: Path) -> None:
    choice = Choice.parse(answer(chosen={"backend": "torch-cpu", "precision": "fp32"}, files=[]))
    exports.save(key, choice, lambda _file: None)

    assert exports.find(key) == choice
    assert exports.place(key, choice, tmp_path / "engine") == Backend("torch-cpu", "fp32", None)


@pytest.mark.parametrize(
    "changed",
    [
        {"model_sha256": "cd" * 32},
        {"device": "another CPU"},
        {"imgsz": None},
        {"candidates": ("torch-cpu",)},
        {"versions": {"torch": "2.16"}},
    ],
)
def test_it_holds_for_nothing_else(
    exports: ModelExports, key: Key, tmp_path: Path, changed: dict[str, Any]
) -> None:
    save(exports, key, tmp_path)

    assert exports.find(replace(key, **changed)) is None
    assert exports.find(key) is not None


def test_an_update_of_a_library_replaces_what_the_old_one_made(
    exports: ModelExports, key: Key, store: Path, tmp_path: Path
) -> None:
    save(exports, key, tmp_path)
    small = replace(key, imgsz=320)
    save(exports, small, tmp_path)
    newer = replace(key, versions={"torch": "2.16"})
    save(exports, newer, tmp_path)

    assert [path.name for path in (store / "exports").iterdir()] == [newer.directory_name]


def test_of_a_model_the_latest_choices_are_kept(exports: ModelExports, key: Key, tmp_path: Path) -> None:
    sizes = [replace(key, imgsz=32 * number) for number in range(1, 12)]
    other = replace(key, model_sha256="cd" * 32)
    for number, one in enumerate([other, *sizes]):
        save(exports, one, tmp_path)
        choice = tmp_path / "models" / "exports" / one.directory_name / "choice.json"
        os.utime(choice, (number, number))
    found = [one.imgsz for one in sizes if exports.find(one)]
    assert found == [one.imgsz for one in sizes[-model_exports.MAX_OF_A_MODEL :]]
    assert exports.find(other)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"choice": {"chosen": 1}}', b"\xff" * 100])
def test_a_corrupted_choice_is_removed_and_made_again(
    exports: ModelExports, key: Key, store: Path, tmp_path: Path, logged: list[str], content: bytes
) -> None:
    choice = save(exports, key, tmp_path)
    (store / "exports" / key.directory_name / "choice.json").write_bytes(content)

    assert exports.find(key) is None
    assert any("it is made again" in line for line in logged)
    assert list((store / "exports").iterdir()) == []
    save(exports, key, tmp_path)
    assert exports.find(key) == choice


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_file_that_changed_is_not_placed(
    exports: ModelExports, key: Key, store: Path, tmp_path: Path, damage: str
) -> None:
    choice = save(exports, key, tmp_path)
    file = store / "exports" / key.directory_name / "model.onnx"
    file.write_bytes(b"something else") if damage == "changed" else file.unlink()

    with pytest.raises(ModelUnavailableError, match="is made again"):
        exports.place(key, choice, tmp_path / "engine")
    assert list((tmp_path / "engine").iterdir()) == []
    assert exports.find(key) is None


def test_what_the_child_left_is_held_against_what_it_said(
    exports: ModelExports, key: Key, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(JobCrashedError, match="has the sha256"):
        save(exports, key, tmp_path, b"another network")
    with pytest.raises(JobCrashedError, match="is not there"):
        exports.save(key, Choice.parse(answer()), lambda _file: None)

    assert exports.find(key) is None
    assert list((store / "exports").iterdir()) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"chosen": {"backend": "shell", "precision": "fp32"}},
        {"chosen": {"backend": "torch-cpu", "precision": "fp32"}},
        {"files": []},
        {"files": [{"name": "../../evil", "size_bytes": 1, "sha256": "0" * 64}]},
        {"files": [{"name": "model.onnx", "size_bytes": 10**12, "sha256": "0" * 64}]},
        {"files": [{"name": "model.onnx", "size_bytes": 1, "sha256": "x"}]},
        {"more": 1},
        {"measured": None},
        {"measured": {"openvino bf16": {"error": "x" * 600_000}}},
    ],
)
def test_a_child_cannot_choose_what_there_is_not(changed: dict[str, Any]) -> None:
    with pytest.raises(JobCrashedError, match="export"):
        Choice.parse(answer(**changed))


def test_exports_count_with_their_weights_and_go_with_them(
    exports: ModelExports, key: Key, store: Path, tmp_path: Path
) -> None:
    models = ModelStore(store, limit_bytes=100_000)
    added = []
    for number in range(2):
        weights = tmp_path / "weights"
        weights.write_bytes(bytes([number]) * 1000)
        added.append(models.add(weights))
        save(exports, replace(key, model_sha256=added[-1]), tmp_path)
    stray = replace(key, model_sha256="ef" * 32)
    save(exports, stray, tmp_path)
    models.get(added[0])

    assert models.trim() == []
    assert exports.find(stray) is None
    assert models.trim(limit_bytes=len(ONNX) + 3000) == [added[1]]
    assert exports.find(replace(key, model_sha256=added[1])) is None
    assert exports.find(replace(key, model_sha256=added[0])) is not None


def test_half_an_export_is_never_seen(
    exports: ModelExports, key: Key, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_exports.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(exports, key, tmp_path)

    assert exports.find(key) is None
    assert list((store / "exports").iterdir()) == []


def test_the_same_export_made_twice_is_one(
    exports: ModelExports, key: Key, store: Path, tmp_path: Path
) -> None:
    choice = save(exports, key, tmp_path)
    save(exports, key, tmp_path)

    assert exports.find(key) == choice
    assert len(list((store / "exports").iterdir())) == 1
    shutil.rmtree(store / "exports" / key.directory_name)
    assert exports.find(key) is None


def test_what_is_tried_and_what_it_depends_on() -> None:
    assert model_exports.candidates("auto", "cpu") == ("openvino", "onnxruntime", "torch-cpu")
    assert model_exports.candidates("auto", "0") == ("tensorrt", "torch-cuda")
    assert model_exports.candidates("torch", "0") == ("torch-cuda",)
    assert "torch" in model_exports.library_versions()
    assert model_exports.cpu_name().endswith("cores")
    assert json.loads(json.dumps(model_exports.library_versions()))
