"""Real trainings on the CPU, each in the child that the daemon would start."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.compute_child import ComputeChild
from tests.drawn_dataset import NAMES, draw, write_yaml

pytestmark = pytest.mark.slow

OPTIONS = {
    "epochs": 2,
    "imgsz": 64,
    "batch": 8,
    "seed": 5,
    "patience": 50,
    "close_mosaic": 1,
    "optimizer": "AdamW",
}

#: The same training without a line of ours, except that it may not reach the network either.
PLAIN = """
import json, sys
from ultralytics import YOLO
data, project, options = sys.argv[1:]
settings = {"data": data, "project": project, "name": "run", "device": "cpu", "plots": False}
metrics = YOLO("yolo11n.yaml").train(**settings, **json.loads(options))
json.dump(metrics.results_dict, open(project + "/metrics.json", "w"))
"""


@dataclass(frozen=True)
class Trained:
    """A finished training beside the plain one of the same settings."""

    child: ComputeChild
    plain: Path

    @property
    def result(self) -> dict[str, Any]:
        answer = self.child.result()
        assert answer["ok"], answer
        return dict(answer["result"])

    @property
    def history(self) -> list[dict[str, Any]]:
        return [entry for message in self.child.received for entry in message.get("history", [])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Two epochs from scratch, as a user whose name and folders may not be found in what is published."""
    root = tmp_path_factory.mktemp("canary-workspace")
    draw(root / "prepare", images={"train": 16, "val": 6, "test": 4})
    (root / "in").mkdir()
    (root / "in" / "active.pt").write_bytes(b"no checkpoint")
    job = {
        "task": "train_yolo11",
        "model": "yolo11n.yaml",
        "label_task": "detect",
        "data": "prepare/data.yaml",
        "options": OPTIONS,
        "active_model": "in/active.pt",
        "device": "cpu",
        "time_limit_h": None,
    }
    names = {"USER": "canary-user", "LOGNAME": "canary-user", "HOME": str(root / "canary-home")}
    child = ComputeChild(root, "train", job, env=names)

    plain = tmp_path_factory.mktemp("plain")
    config = plain / "config" / "Ultralytics"
    config.mkdir(parents=True)
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    shutil.copy(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", config / "Arial.ttf")
    data = draw(plain, images={"train": 16, "val": 6, "test": 4})
    with (plain / "log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-c", PLAIN, str(data), str(plain), json.dumps(OPTIONS)],
            env={"PATH": os.environ["PATH"], "YOLO_OFFLINE": "1", "YOLO_CONFIG_DIR": str(plain / "config")},
            stdout=log,
            stderr=log,
            check=True,
            cwd=plain,
        )
    child.finish()
    yield Trained(child, plain)
    if child.process.poll() is None:
        child.process.kill()


def rows(file: Path) -> list[dict[str, float]]:
    """The rows of a results.csv without the times."""
    with file.open() as stream:
        return [
            {key: float(value) for key, value in row.items() if key != "time"}
            for row in csv.DictReader(stream)
        ]


def tensors(file: Path) -> list[str]:
    """The hashes of a checkpoint's tensors, whatever order they lie in."""
    with zipfile.ZipFile(file) as archive:
        return sorted(
            hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist() if "/data/" in name
        )


def test_it_is_the_training_that_ultralytics_alone_would_do(trained: Trained) -> None:
    metrics = trained.result["metrics"]
    plain = json.loads((trained.plain / "metrics.json").read_text())

    assert rows(trained.child.directory / "results.csv") == rows(trained.plain / "run" / "results.csv")
    assert tensors(trained.child.directory / "best.pt") == tensors(
        trained.plain / "run" / "weights" / "best.pt"
    )
    for name in ("precision", "recall", "mAP50", "mAP50-95"):
        assert metrics[name] == pytest.approx(plain[f"metrics/{name}(B)"], abs=5e-5)
    assert metrics["fitness"] == pytest.approx(plain["fitness"], abs=5e-5)


def test_each_epoch_is_told_once_and_in_order(trained: Trained) -> None:
    assert [entry["epoch"] for entry in trained.history] == [1, 2]
    for entry in trained.history:
        assert set(entry["losses"]) == set(entry["val_losses"]) == {"box_loss", "cls_loss", "dfl_loss"}
        assert set(entry["metrics"]) == {"precision", "recall", "mAP50", "mAP50-95"}
        assert entry["epochs"] == 2
        assert entry["lr"] > 0
        assert entry["epoch_s"] > 0
    assert trained.history[-1]["eta_s"] == 0
    told = [message for message in trained.child.received if "checkpoint" not in message]
    fractions = [message["fraction"] for message in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    phases = [message["phase"] for message in told]
    assert phases == sorted(phases, key=["train", "evaluate"].index)
    assert set(phases) == {"train", "evaluate"}
    assert (trained.result["epochs"], trained.result["ended_by"]) == (2, "epochs")


def test_it_reaches_for_no_network(trained: Trained) -> None:
    watched = trained.child.watched_file.read_text().splitlines()
    # ctypes and matplotlib ask these two where libraries and fonts are.
    local = [
        line
        for line in watched
        if line.startswith(("subprocess.Popen ('fc-list'", "subprocess.Popen ('/sbin/ldconfig'"))
    ]

    assert watched == local


def test_nothing_published_tells_where_it_was_made(trained: Trained) -> None:
    files = trained.result["files"]
    traces = [b"canary", str(Path.home()).encode() + b"/", b"site-packages"]
    if len(socket.gethostname()) > 5:
        traces.append(socket.gethostname().encode())

    assert {"best.pt", "results.csv", "args.yaml", "results.png", "labels.jpg"} <= set(files)
    assert {"confusion_matrix.png", "BoxPR_curve.png", "train_batch0.jpg", "val_batch0_pred.jpg"} <= set(
        files
    )
    for name in files:
        content = (trained.child.directory / name).read_bytes()
        assert content, name
        assert not [trace for trace in traces if trace in content], name
    assert b"canary-workspace" in (trained.child.directory / "run" / "args.yaml").read_bytes(), (
        "no trace to find"
    )
    assert "epochs: 2\n" in (trained.child.directory / "args.yaml").read_text()


def test_the_report_tells_what_was_in_effect(trained: Trained) -> None:
    effective, versions = trained.result["effective"], trained.result["versions"]

    assert {**OPTIONS, "close_mosaic": 1, "workers": 0, "amp": False}.items() <= effective.items()
    assert effective["architecture"] == "yolo11n"
    assert effective["model"] == "yolo11n.yaml"
    assert effective["device_name"].startswith("cpu")
    assert all(
        versions[name] for name in ("python", "torch", "torchvision", "ultralytics", "numpy", "opencv")
    )


def test_each_class_and_the_test_split_are_measured(trained: Trained) -> None:
    metrics = trained.result["metrics"]

    assert list(metrics["per_class"]) == list(metrics["test"]["per_class"]) == NAMES
    assert [entry["instances"] for entry in metrics["per_class"].values()] == [6, 6]
    assert [entry["images"] for entry in metrics["test"]["per_class"].values()] == [4, 4]


def test_an_unreadable_active_model_does_not_cost_the_training(trained: Trained) -> None:
    assert "active.pt is not a checkpoint" in trained.result["metrics"]["active"]["error"]


@pytest.fixture
def real(tmp_path: Path, shared: Path) -> Path:
    """A workspace with the trained base model, few real pictures to train on and the whole val split."""
    (tmp_path / "in").mkdir()
    for name in ("base.pt", "active.pt"):
        shutil.copyfile(shared / "models" / "pet_hdpe_yolo11n.pt", tmp_path / "in" / name)
    source = shared / "datasets" / "pet_hdpe_det"
    for split, count in (("train", 16), ("val", 1000)):
        for kind in ("images", "labels"):
            target = tmp_path / "prepare" / "data" / kind / split
            target.mkdir(parents=True)
            for file in sorted((source / kind / split).iterdir())[:count]:
                shutil.copyfile(file, target / file.name)
    write_yaml(tmp_path / "prepare", ["train", "val"], ["HDPE", "PET"])
    return tmp_path


def test_a_time_limit_ends_a_training_as_a_good_one(real: Path) -> None:
    job = {
        "task": "train_yolo11",
        "model": "in/base.pt",
        "model_name": "pet_v1",
        "label_task": "detect",
        "data": "prepare/data.yaml",
        "options": {"epochs": 50, "imgsz": 160, "batch": 8},
        "active_model": "in/active.pt",
        "device": "cpu",
        "time_limit_h": 1e-6,
    }
    child = ComputeChild(real, "train", job)
    result = child.finish()["result"]

    assert (result["ended_by"], result["epochs"]) == ("time_limit", 1)
    assert result["effective"]["model"] == "pet_v1"
    assert result["metrics"]["mAP50"] > 0.5
    # Known of this model on this split at this size; batches of another size would pad otherwise.
    active = result["metrics"]["active"]
    assert active["mAP50"] == pytest.approx(0.880, abs=0.01)
    assert active["per_class"]["PET"]["instances"] == 26

    # Gone on from after its end, it is only measured: in the same way.
    again = ComputeChild(real, "train", {**job, "resume": "train/checkpoint-1.tar", "attempt": 2})
    measured = again.finish()["result"]
    for key in ("metrics", "effective", "epochs", "ended_by", "attempts"):
        assert measured[key] == result[key], key
    assert [message["phase"] for message in again.received if message.get("history")] == ["train"]


def test_a_training_whose_losses_are_not_numbers_is_the_jobs_fault(real: Path) -> None:
    base = real / "in" / "base.pt"
    with zipfile.ZipFile(real / "in" / "active.pt") as good, zipfile.ZipFile(base, "w") as poisoned:
        for name in good.namelist():
            content = good.read(name)
            is_weight = "/data/" in name and len(content) > 1000
            not_numbers = b"\x00\x7e" * (len(content) // 2)  # in fp16
            poisoned.writestr(name, not_numbers if is_weight else content)
    child = training(real, imgsz=64, model="in/base.pt")
    answer = child.finish()

    assert answer["error"]["code"] == "invalid_job"
    assert "diverged" in answer["error"]["message"]
    assert answer["detail"]["epochs"] == 1
    assert "results.csv" in answer["detail"]["files"]
    assert "best.pt" not in answer["detail"]["files"]
    (entry,) = (entry for message in child.received for entry in message.get("history", []))
    assert entry["losses"]["cls_loss"] is None


def test_a_stop_ends_a_training_within_a_batch(tmp_path: Path) -> None:
    draw(tmp_path / "prepare", polygons=True, edge_px=320)
    child = training(tmp_path, "segment", epochs=50, imgsz=320, batch=2)
    for message in child.messages():
        if message.get("fraction", 0) > 0:
            child.process.send_signal(signal.SIGTERM)

    assert child.result() == {"ok": False, "stopped": True}
    assert not any("history" in message for message in child.received)
    assert not (child.directory / "run" / "results.csv").exists()
    assert not (child.directory / "best.pt").exists()


#: Makes the `last.pt` of a checkpoint say that the best epoch was better than any that follows.
BETTER = """
import io, sys, tarfile
import torch, ultralytics.nn.tasks
parts = {}
with tarfile.open(sys.argv[1]) as archive:
    for entry in archive:
        parts[entry.name] = archive.extractfile(entry).read()
last = torch.load(io.BytesIO(parts["last.pt"]), weights_only=False)
last["best_fitness"] = last["stopper"]["best_fitness"] = 0.99
buffer = io.BytesIO()
torch.save(last, buffer)
parts["last.pt"] = buffer.getvalue()
with tarfile.open(sys.argv[2], "w") as archive:
    for name, content in parts.items():
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
"""


def test_a_training_that_goes_on_keeps_the_best_of_before(tmp_path: Path) -> None:
    draw(tmp_path / "prepare")
    (tmp_path / "in").mkdir()
    child = training(tmp_path, epochs=3)
    for message in child.messages():
        if message.get("history") and message["epoch"] == 1:
            child.process.send_signal(signal.SIGTERM)
    assert child.result() == {"ok": False, "stopped": True}
    (file,) = child.directory.glob("checkpoint-*.tar")
    subprocess.run(
        [sys.executable, "-c", BETTER, file, tmp_path / "in" / "checkpoint.tar"],
        check=True,
        env={"PATH": os.environ["PATH"], "YOLO_CONFIG_DIR": str(child.directory / ".config")},
    )
    with tarfile.open(file) as archive:
        archive.extract("best.pt", tmp_path, filter="data")
    shutil.rmtree(child.directory)
    child = training(tmp_path, resume="in/checkpoint.tar", epochs=3)
    result = child.finish()["result"]

    assert [run["epochs"] for run in result["attempts"]] == [1, 2]
    assert [entry["epoch"] for message in child.received for entry in message.get("history", [])] == [1, 2, 3]
    assert tensors(child.directory / "best.pt") == tensors(tmp_path / "best.pt")
    assert [row["epoch"] for row in rows(child.directory / "results.csv")] == [1, 2, 3]


class _Evil:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (self.marker, 0o700)


def test_a_checkpoint_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    draw(tmp_path / "prepare", images={"train": 8, "val": 2})
    marker = tmp_path / "it-ran"
    (tmp_path / "in").mkdir()
    pickle.loads(pickle.dumps(_Evil(str(marker))))
    marker.rmdir()  # the attack works without the defence
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("last/data.pkl", pickle.dumps(_Evil(str(marker)), protocol=2))
        archive.writestr("last/version", "3")
    with tarfile.open(tmp_path / "in" / "checkpoint.tar", "w") as archive:
        state = b'{"epochs": 1, "runs": [], "history": []}'
        for name, content in (("state.json", state), ("last.pt", evil.getvalue())):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    child = training(tmp_path, resume="in/checkpoint.tar")
    result = child.finish()["result"]

    assert [run["epochs"] for run in result["attempts"]] == [1]
    assert not marker.exists()
    assert "the training starts from the beginning: last.pt would run code" in child.log_file.read_text()


def training(
    root: Path,
    label_task: str = "detect",
    *,
    model: str | None = None,
    resume: str | None = None,
    **options: Any,
) -> ComputeChild:
    """Start a training on the data set in `root`."""
    job = {
        "task": "train_yolo11",
        "model": model or {"detect": "yolo11n.yaml", "segment": "yolo11n-seg.yaml"}[label_task],
        "label_task": label_task,
        "data": "prepare/data.yaml",
        "options": {"epochs": 1, "imgsz": 64, "batch": 8, **options},
        "active_model": None,
        "device": "cpu",
        "resume": resume,
    }
    return ComputeChild(root, "train", job)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ComputeChild]:
    """Trainings that need not wait for each other."""
    started = {}
    for name in ("segment", "no labels", "frozen"):
        root = tmp_path_factory.mktemp(name.replace(" ", "-"))
        draw(root / "prepare", polygons=name == "segment", images={"train": 8, "val": 2})
        if name == "segment":
            started[name] = training(root, "segment")
        elif name == "no labels":
            for label in (root / "prepare" / "data" / "labels" / "train").iterdir():
                label.write_text("7 0.5 0.5 0.1 0.1\n")  # no class has this id
            started[name] = training(root)
        else:
            started[name] = training(root, freeze=24)
    for child in started.values():
        child.finish()
    return started


def test_segmentation_measures_masks_beside_boxes(finished: dict[str, ComputeChild]) -> None:
    result = finished["segment"].result()["result"]

    assert set(result["metrics"]["mask"]) == {"precision", "recall", "mAP50", "mAP50-95"}
    assert set(result["metrics"]["per_class"]["can"]["mask"]) == {"precision", "recall", "mAP50", "mAP50-95"}
    assert {"MaskPR_curve.png", "BoxPR_curve.png"} <= set(result["files"])
    (entry,) = (entry for message in finished["segment"].received for entry in message.get("history", []))
    assert "seg_loss" in entry["losses"]
    assert "mask" in entry["metrics"]
    assert result["metrics"]["active"] is None
    assert result["metrics"]["test"] is None


def test_options_that_do_not_hold_are_the_jobs_fault(finished: dict[str, ComputeChild]) -> None:
    error = finished["frozen"].result()["error"]

    assert error["code"] == "invalid_job"
    assert "froze the entire model" in error["message"]


def test_a_data_set_without_labels_is_the_data_sets_fault(finished: dict[str, ComputeChild]) -> None:
    answer = finished["no labels"].result()

    assert answer["error"]["code"] == "dataset_invalid"
    assert str(finished["no labels"].directory.parent) not in answer["error"]["message"]
    assert answer["detail"] == {"files": [], "epochs": 0, "batch": 8, "imgsz": 64}
