"""Checkpoints that torch wrote: opened, told apart, cleaned, and checked in a child."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.compute_child import ComputeChild

pytestmark = pytest.mark.slow

#: Makes models, opens each as a detect model, and prints what came of it as JSON.
_MAKE_AND_OPEN = """
import json, sys
from pathlib import Path
from rvmcv_worker.compute import ultralytics_env
from rvmcv_worker.errors import JobError, OutOfGpuMemoryError
root = Path(sys.argv[1])
ultralytics_env.isolate(root)
from ultralytics import YOLO
from rvmcv_worker.compute import checkpoint, training_faults
import torch
ultralytics_env.require_safe_load()

def save(name, yolo):
    torch.save({"model": yolo.model.half(), "train_args": yolo.overrides}, root / name)

def opened(name):
    try:
        return list(checkpoint.identify(checkpoint.open_yolo11(root / name, "detect").model, name))
    except JobError as error:
        return error.to_wire()

answers = {}
for architecture in ("yolo11n", "yolo11s", "yolo11n-seg", "yolov8n", "yolo26n"):
    save(f"{architecture}.pt", YOLO(f"{architecture}.yaml"))
    answers[architecture] = opened(f"{architecture}.pt")
torch.save({"model": {"layer": torch.zeros(3)}}, root / "weights.pt")
answers["weights only"] = opened("weights.pt")
torch.save(torch.nn.Linear(2, 2), root / "linear.pt")
answers["another model"] = opened("linear.pt")
nameless = YOLO("yolo11n.yaml")
nameless.model.names = {"0": "x", "7": "y"}
try:
    answers["names"] = checkpoint.class_names(nameless.model)
except JobError as error:
    answers["names"] = error.to_wire()

diverged = YOLO("yolo11n.yaml")
with torch.no_grad():
    for parameter in diverged.model.parameters():
        parameter.fill_(float("nan"))
save("diverged.pt", diverged)

faults = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."),
    "memory": MemoryError("7 GiB"),
    "worker": RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
    "disk": OSError(28, "No space left on device"),
    "nan": RuntimeError("Training failed: NaN persisted for 4 epochs"),
    "else": RuntimeError(f"what is this at {root}/x"),
}
answers["faults"] = {
    name: training_faults.explain(error, batch=16, imgsz=640, started=True, root=root).to_wire()
    for name, error in faults.items()
}
(root / "answers.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, with what opening each brought in `answers.json`."""
    root = tmp_path_factory.mktemp("models")
    subprocess.run(
        [sys.executable, "-c", _MAKE_AND_OPEN, str(root)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return root


@pytest.fixture(scope="module")
def answers(made: Path) -> dict[str, Any]:
    return dict(json.loads((made / "answers.json").read_text()))


@pytest.mark.parametrize("architecture", ["yolo11n", "yolo11s"])
def test_a_yolo11_is_opened_and_named(answers: dict[str, Any], architecture: str) -> None:
    assert answers[architecture] == [architecture, "detect"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("yolo11n-seg", "is a segment model (yolo11n-seg), but the job is for detect"),
        ("yolov8n", "is not a YOLO11 detect or segment model (it is yolov8n.yaml)"),
        ("yolo26n", "is not a YOLO11 detect or segment model (it is yolo26n.yaml)"),
        ("weights only", "does not load as an Ultralytics checkpoint"),
        ("another model", "does not load as an Ultralytics checkpoint"),
        ("names", "no class names"),
    ],
)
def test_another_model_is_refused_and_told_what_it_is(answers: dict[str, Any], name: str, told: str) -> None:
    assert answers[name]["code"] == "model_invalid"
    assert told in answers[name]["message"]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("cuda", "out_of_gpu_memory"),
        ("cublas", "out_of_gpu_memory"),
        ("memory", "out_of_memory"),
        ("worker", "out_of_memory"),
        ("disk", "disk_quota"),
        ("nan", "invalid_job"),
        ("else", "internal"),
    ],
)
def test_what_a_training_raises_becomes_an_error_of_the_protocol(
    answers: dict[str, Any], made: Path, fault: str, code: str
) -> None:
    assert answers["faults"][fault]["code"] == code
    assert str(made) not in answers["faults"][fault]["message"]


def check(root: Path, candidate: Path, **job: Any) -> ComputeChild:
    (root / "in").mkdir(parents=True)
    shutil.copyfile(candidate, root / "in" / "candidate.pt")
    return ComputeChild(root, "check", {"task": "check_model", "model": "in/candidate.pt", **job})


def test_the_check_child_tells_good_from_bad(tmp_path: Path, made: Path) -> None:
    names = [f"class{number}" for number in range(80)]
    children = {
        "good": check(tmp_path / "1", made / "yolo11n.pt", label_task="detect", expect={"names": None}),
        "names": check(tmp_path / "2", made / "yolo11n.pt", label_task="detect", expect={"names": names}),
        "diverged": check(tmp_path / "3", made / "diverged.pt", label_task="detect"),
        "types": check(tmp_path / "4", made / "yolov8n.pt", label_task="detect"),
    }
    answers = {name: child.finish() for name, child in children.items()}

    good = answers.pop("good")["result"]
    assert (good["ok_types"], good["task"], good["architecture"]) == (True, "detect", "yolo11n")
    assert len(good["names"]) == 80
    assert good["parameters"] == 2_624_080
    assert good["size_bytes"] == (made / "yolo11n.pt").stat().st_size
    assert {answer["error"]["code"] for answer in answers.values()} == {"model_invalid"}
    told = {name: answer["error"]["message"] for name, answer in answers.items()}
    assert "not ['class0'" in told["names"]
    assert "not finite" in told["diverged"]
    assert "block.C2f: no YOLO11 training writes that" in told["types"]


def test_a_base_model_made_elsewhere_passes_as_a_base(tmp_path: Path, shared: Path) -> None:
    child = check(tmp_path, shared / "models" / "garbage_yolo11n_seg.pt", label_task="segment", origin="base")
    result = child.finish()["result"]

    assert (result["task"], len(result["names"])) == ("segment", 6)
    assert result["sha256"] == "fd055fcc5935c0f02302cfca9a25297f944df31c9fbcff52a2d1f362e903e889"
