"""Rows 21 and 22, and the audit: files that run code elsewhere, in a training and an inference.

One data set and one checkpoint carry everything that Ultralytics, torch, NumPy or Hydra would run. Opened as
any program opens them they write their markers; a whole job is then done with them behind the wall, under a
watch that writes down each attempt to reach a network, to start a program or to install a package.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rvmcv_worker import workspace
from rvmcv_worker.config import LimitSettings
from rvmcv_worker.launch import PYTHON
from rvmcv_worker.sandbox import Bubblewrap
from rvmcv_worker.spawner import Spawner
from tests.child_fixtures import Runner, wall
from tests.dataset_fixtures import LIMITS, pack_folder
from tests.drawn_dataset import draw
from tests.sam2_jobs import sam2_job

__all__ = ["wall"]

pytestmark = pytest.mark.slow

#: What writes a marker where it is loaded -> the name of the marker.
KINDS = ("pickle", "download", "activation", "target", "cache")

PREPARE = {
    "task": "prepare",
    "archive": "in/dataset.zip",
    "limits": LIMITS,
    "val_split": 0.2,
    "seed": 0,
    "max_bad_fraction": 0.1,
}
PREPARED = {
    "prepare": {"job_type": "yolo11", "label_task": "detect"},
    "prepare-sam2": {"job_type": "sam2", "label_task": "segment"},
}

#: Loads each as its library does when nobody has told it not to.
PLAIN = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
def tried(load):
    try:
        load()
    except Exception:
        pass  # what it loads is no model; by then it has run
import numpy as np
import torch
from hydra.utils import instantiate
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.tasks import DetectionModel
tried(lambda: torch.load(folder / "poisoned.pt", weights_only=False))
tried(lambda: np.load(folder / "labels.cache", allow_pickle=True))
tried(lambda: instantiate({"_target_": "os.mkdir", "path": str(folder / "target")}))
tried(lambda: DetectionModel(str(folder / "yolo11n.yaml"), verbose=False))
tried(lambda: check_det_dataset(str(folder / "data.yaml")))
"""

#: A whole job in one process, watched from before its first import.
WATCHED = """
import json, os, sys
from pathlib import Path
seen = []
EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
          "socket.sendmsg", "urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect"}
PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
INSTALLERS = {"pip", "ensurepip", "uv", "conda", "setuptools"}
def hook(event, arguments):
    if event in EVENTS:
        seen.append(["network", event, repr(arguments)[:200]])
    elif event in PROGRAMS:
        seen.append(["program", str(arguments[0]), repr(arguments)[:200]])
    elif event == "import" and str(arguments[0]).split(".")[0] in INSTALLERS:
        seen.append(["installer", "import", arguments[0]])
sys.addaudithook(hook)

name = sys.argv[1]
job = json.loads(Path(name, "job.json").read_text())
from rvmcv_worker.compute.child import Child, run_task
from rvmcv_worker.errors import JobError

answers, refused = {}, {}
for step, task in job["steps"].items():
    directory = Path.cwd() / name / step
    directory.mkdir()
    child = Child(root=Path.cwd(), directory=directory, progress_fd=job["progress_fd"])
    run_task(task, child)
    answers[step] = json.loads((directory / "result.json").read_text())
    assert answers[step]["ok"], answers[step]

import numpy as np
from rvmcv_worker.compute import sam2_checkpoint
from rvmcv_worker.compute.detector import open_detector
from rvmcv_worker.compute.embedding_cache import EmbeddingCache
from rvmcv_worker.compute.segmenter import open_segmenter
from rvmcv_worker.engine_wire import Backend
torch_cpu = Backend("torch-cpu", "fp32")
picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
detector = open_detector(Path(name, "yolo11", "best.pt"), torch_cpu, imgsz=64, device="cpu")
found = detector.detect([picture], confidence=0.0, iou=0.7, max_detections=3, masks=False)[0]
segmenter = open_segmenter(Path(name, "sam2", "best.pt"), device="cpu", cache=None)
mask = next(segmenter.segment(picture, np.array([[8, 8, 40, 40]], np.float32), image_key="picture"))
answers["inference"] = {"ok": True, "boxes": len(found.boxes), "mask": list(mask.shape)}

for kind, load in {
    "detector": lambda path: open_detector(path, torch_cpu, imgsz=64, device="cpu"),
    "segmenter": lambda path: open_segmenter(path, device="cpu", cache=None),
}.items():
    for path in job["poisoned"]:
        try:
            load(Path(path))
        except JobError as error:
            refused[f"{kind} {path}"] = error.code

loopback = [line.split() for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line]
counted = {fields[0].rstrip(":"): int(fields[1]) + int(fields[9]) for fields in loopback}
result = {"answers": answers, "refused": refused, "seen": seen, "bytes": counted}
Path(name, "result.json").write_text(json.dumps({"ok": True, "result": result}))
"""


class _Run:
    """What a pickle may do: here, make a directory."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._directory,)


def _poison(folder: Path, markers: str) -> None:
    """Write what makes a directory `markers`/KIND where it is loaded carelessly."""
    import torch

    torch.save({"model": _Run(f"{markers}/pickle")}, folder / "poisoned.pt")
    (folder / "legacy.pt").write_bytes(pickle.dumps({"model": _Run(f"{markers}/pickle")}))
    cache = io.BytesIO()
    np.save(cache, np.array(_Run(f"{markers}/cache"), dtype=object), allow_pickle=True)
    (folder / "labels.cache").write_bytes(cache.getvalue())
    evil = {
        "names": ["can", "bottle"],
        "train": "images/train",
        "val": "images/not-there",
        "download": f"import os\nos.mkdir('{markers}/download')",
        "_target_": "os.mkdir",
        "path": f"{markers}/target",
        "activation": f"__import__('os').mkdir('{markers}/activation') or torch.nn.SiLU()",
    }
    (folder / "evil.yaml").write_text(yaml.safe_dump(evil))


def _reached(folder: Path) -> list[str]:
    return [kind for kind in KINDS if (folder / kind).exists()]


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What runs where the files are loaded in a plain process."""
    from ultralytics.nn.tasks import yaml_model_load

    folder = tmp_path_factory.mktemp("plain")
    _poison(folder, str(folder))
    evil = yaml.safe_load((folder / "evil.yaml").read_text())
    (folder / "data.yaml").write_text(yaml.safe_dump({**evil, "path": str(folder)}))
    model = {**yaml_model_load("yolo11n.yaml"), "activation": evil["activation"]}
    del model["yaml_file"]
    (folder / "yolo11n.yaml").write_text(yaml.safe_dump(model))
    (folder / "config" / "Ultralytics").mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder)],
        env={"PATH": os.environ["PATH"], "YOLO_OFFLINE": "1", "YOLO_CONFIG_DIR": str(folder / "config")},
        cwd=folder,
        capture_output=True,
        timeout=120,
        check=True,
    )
    return _reached(folder)


@pytest.fixture(scope="module")
def job(wall: Bubblewrap, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What was seen of a whole job on the same files behind the wall."""
    root = tmp_path_factory.mktemp("work")
    drawn = root / "drawn"
    draw(drawn, polygons=True, images={"train": 4, "val": 2})
    _poison(drawn, "/job/train")
    for name in ("labels.cache", "evil.yaml", "data.yaml", "poisoned.pt", "legacy.pt"):
        (drawn / name).rename(drawn / "data" / name)
    (drawn / "data" / "evil.yaml").replace(drawn / "data" / "data.yaml")
    for split in ("train", "val"):
        cache = (drawn / "data" / "labels.cache").read_bytes()
        (drawn / "data" / "labels" / f"{split}.cache").write_bytes(cache)
    with workspace.make(root / "work", "job", 1) as place, contextlib.closing(Spawner()) as spawner:
        pack_folder(place.in_dir / "dataset.zip", drawn / "data")
        for name in ("poisoned.pt", "legacy.pt"):
            (place.in_dir / name).write_bytes((drawn / "data" / name).read_bytes())
        runner = Runner(wall, place, spawner, "", limits=LimitSettings(disk_floor_gb=0.001))
        for name, kind in PREPARED.items():
            runner.child({**PREPARE, **kind}, name=name)
        written = {path.name: path.read_bytes() for path in (place.root / "prepare").rglob("*.yaml")}
        caches = [path.name for path in (place.root / "prepare").rglob("*.cache")]
        yolo11 = {
            "task": "train_yolo11",
            "model": "yolo11n.yaml",
            "label_task": "detect",
            "data": "prepare/data.yaml",
            "options": {"epochs": 1, "imgsz": 64, "batch": 4, "seed": 5, "optimizer": "AdamW"},
            "active_model": "in/poisoned.pt",
            "device": "cpu",
            "time_limit_h": None,
        }
        sam2 = sam2_job(options={"epochs": 1}, names=["can", "bottle"], data="prepare-sam2/data")
        watched = {
            "steps": {"yolo11": yolo11, "sam2": sam2},
            "poisoned": ["in/poisoned.pt", "in/legacy.pt"],
        }
        end = runner.child(
            watched,
            command=(*PYTHON, "-c", WATCHED),
            readable=("prepare", "prepare-sam2"),
            timeout_s=150.0,
        )
        runner.interrupt.close()
        reached = _reached(place.root / "train")
        yield {**end.result, "reached": reached, "written": written, "caches": caches}


@pytest.mark.parametrize("kind", KINDS)
def test_row_21_22_loaded_carelessly_it_runs(careless: list[str], kind: str) -> None:
    assert kind in careless


def test_row_21_22_nothing_of_it_runs_in_a_job(job: dict[str, Any]) -> None:
    assert job["reached"] == []


def test_row_21_a_checkpoint_that_runs_code_is_refused_as_each_kind_of_model(job: dict[str, Any]) -> None:
    assert len(job["refused"]) == 4
    assert set(job["refused"].values()) == {"model_invalid"}


def test_row_22_the_data_yaml_is_ours_and_no_cache_is_left(job: dict[str, Any]) -> None:
    assert set(yaml.safe_load(job["written"]["data.yaml"])) == {"path", "train", "val", "names"}
    assert job["caches"] == []


def test_the_job_was_a_real_one(job: dict[str, Any]) -> None:
    answers = job["answers"]
    assert [answers[step]["ok"] for step in ("yolo11", "sam2", "inference")] == [True] * 3
    assert answers["yolo11"]["result"]["epochs"] == 1
    assert "best.pt" in answers["sam2"]["result"]["files"]
    assert (answers["inference"]["boxes"], answers["inference"]["mask"]) == (3, [64, 64])


def test_a_whole_job_reaches_for_no_network_and_installs_nothing(job: dict[str, Any]) -> None:
    seen = job["seen"]
    assert [event for event in seen if event[0] in {"network", "installer"}] == []
    # ctypes and matplotlib ask these where libraries and fonts are.
    programs = {Path(event[1]).name for event in seen if event[0] == "program"}
    assert programs <= {"ldconfig", "fc-list", "gcc", "ld"}


def test_not_a_byte_went_over_the_only_interface(job: dict[str, Any]) -> None:
    assert job["bytes"] == {"lo": 0}


def test_the_watch_sees_what_it_must_not_find(tmp_path: Path) -> None:
    """An audit that finds nothing proves something only if it would have found it."""
    name = "watch"
    (tmp_path / name).mkdir()
    (tmp_path / name / "job.json").write_text(json.dumps({"progress_fd": 1}))
    program = WATCHED.split("from rvmcv_worker", maxsplit=1)[0]
    program += """
import socket, subprocess
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.bind(("127.0.0.1", 0))
sender.sendto(b"a byte", sender.getsockname())
subprocess.run(["true"])
import pip
print(json.dumps(seen))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, name], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    kinds = [event[0] for event in json.loads(run.stdout)]
    assert kinds.count("network") == 1
    assert {"program", "installer"} <= set(kinds)
