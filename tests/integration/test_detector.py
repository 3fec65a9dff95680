"""Detectors on every backend of a CPU, against plain Ultralytics, in one process of their own."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker.model_exports import Choice
from tests.compute_child import ComputeChild

pytestmark = pytest.mark.slow

#: What the scripts below begin with: Ultralytics isolated, and pictures with things in them.
_HEAD = """
import json, sys
from pathlib import Path
from rvmcv_worker.compute import ultralytics_env
root = Path(sys.argv[1])
ultralytics_env.isolate(root)
import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.utils import NUM_THREADS
from rvmcv_worker.compute import backends, detector as detectors, onnx_export, parity, warmup, yolo_masks
from rvmcv_worker.compute.backend_choice import Choice
from rvmcv_worker.compute.detector import open_detector
from rvmcv_worker.engine_wire import Backend
from rvmcv_worker.errors import JobError

TORCH = Backend("torch-cpu", "fp32")

def drawn_model(name, imgsz):
    # Random, but normalised by what it sees and sure of itself: it detects something everywhere.
    torch.manual_seed(0)
    yolo = YOLO(name)
    network, head = yolo.model, yolo.model.model[-1]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    sample = np.stack(warmup.pictures(imgsz, lambda picture: 0.0)[:2])
    with torch.no_grad():
        network.train()(torch.from_numpy(sample).permute(0, 3, 1, 2).flip(1) / 255)
        network.eval()
        logits = network(torch.from_numpy(sample).permute(0, 3, 1, 2) / 255)[1]["scores"]
        for branch in head.cv3:
            branch[-1].weight.mul_(2 / logits.std())
            branch[-1].bias.fill_(-2)
        for branch in head.cv2:
            branch[-1].weight.mul_(4)
    path = root / f"{Path(name).stem}-{imgsz}.pt"
    torch.save({"model": network.half(), "train_args": {"imgsz": imgsz, "task": yolo.task}}, path)
    return path

def picture(width, height):
    return warmup.pictures(max(width, height), lambda picture: 0.0)[0][:height, :width].copy()
"""

#: Detects with our detector and with `YOLO.predict`, and writes down each difference.
_IDENTICAL = """
def differences(path, pictures, **asked):
    plain = YOLO(str(path))
    ours = open_detector(path, TORCH, imgsz=asked.get("imgsz"), device="cpu")
    wrong, count, masks = [], 0, 0
    for image in pictures:
        for whole in (False, True) if ours.label_task == "segment" else (False,):
            torch.set_num_threads(3)  # what others beside it may want; Ultralytics takes its own number
            found = ours.detect([image], confidence=asked["conf"], iou=asked["iou"],
                                max_detections=asked["max_det"], masks=whole)[0]
            threads = torch.get_num_threads()
            torch.set_num_threads(NUM_THREADS)  # as a process has it in which Ultralytics is alone
            expected = plain.predict(image, verbose=False, retina_masks=whole, **asked)[0]
            rows = expected.boxes.data.numpy()
            same = (np.array_equal(found.boxes, rows[:, :4]) and np.array_equal(found.scores, rows[:, 4])
                    and np.array_equal(found.classes, rows[:, 5]))
            if whole:
                truth = expected.masks.data.numpy().astype(bool) if len(rows) else []
                same = same and len(found.masks) == len(truth)
                for mask, true in zip(found.masks, truth):
                    same = same and mask.dtype == bool and mask.shape == image.shape[:2]
                    same = same and np.array_equal(mask, true)
                masks += len(truth)
            if not same:
                wrong.append([image.shape, whole])
            count += len(rows)
    return {"wrong": wrong, "detections": count, "masks": masks, "imgsz": ours.imgsz, "names": ours.names,
            "task": ours.label_task, "threads_before": 3, "threads_after": threads}

sizes = [(160, 160), (160, 120), (90, 160), (333, 250), (40, 300), (31, 17)]
pictures = [picture(*size) for size in sizes]
strict = {"conf": 0.25, "iou": 0.7, "max_det": 300}
loose = {"conf": 0.05, "iou": 0.4, "max_det": 7, "imgsz": 96}
answers = {}
for name in ("yolo11n.yaml", "yolo11n-seg.yaml"):
    path = drawn_model(name, 128)
    answers[name] = {"strict": differences(path, pictures, **strict),
                     "loose": differences(path, pictures, **loose)}
    yolo_masks._PIXELS_AT_ONCE, before = 50_000, yolo_masks._PIXELS_AT_ONCE
    answers[name]["strict, in bits"] = differences(path, pictures, **strict)
    yolo_masks._PIXELS_AT_ONCE = before
letterboxed = open_detector(root / "yolo11n-128.pt", TORCH, imgsz=None, device="cpu").letterboxed

def peak_bytes(whole):
    # 60 masks of 12 megapixels, each over a half of the picture.
    Path("/proc/self/clear_refs").write_text("5")
    held = lambda key: int(Path("/proc/self/status").read_text().partition(key)[2].split()[0]) * 1024
    before = held("VmRSS:")
    rows = torch.rand(60, 6 + 32) - 0.5
    rows[:, :4] = torch.tensor((0.0, 0.0, 320.0, 480.0))
    found = detectors._found(rows, torch.rand(32, 120, 160) - 0.5, (480, 640), (3000, 4000), whole)
    assert len(found.boxes) == 60 and (not whole or len(found.masks) == 60)
    return held("VmHWM:") - before

answers["peaks"] = [peak_bytes(True), peak_bytes(False)]
answers["letterboxed"] = [letterboxed(*size) for size in sizes]
for model, images in json.loads(sys.argv[2]).items():
    import cv2
    real = [cv2.imread(image) for image in images]
    answers[model] = differences(Path(model), real, **{**strict, "conf": 0.05})
"""

#: Compares a model with what is not quite the same, and with its exports.
_PARITY = """
path = root / "yolo11n-seg-128.pt"
reference = open_detector(path, TORCH, imgsz=96, device="cpu")
pictures = warmup.pictures(96, lambda picture: 0.0)
told = [reference.raw(picture) for picture in pictures]

def compared(truth, others):
    total = parity.Comparison()
    for expected, found in zip(truth, others, strict=True):
        total += parity.compare(expected, found, classes=80)
    return vars(total)

def changed(change):
    others = [backends.Raw(raw.predictions.clone(), raw.prototypes.clone()) for raw in told]
    for raw in others:
        change(raw.predictions, raw.prototypes)
    return others

def nothing(rows, masks): pass
def nearly(rows, masks): rows[:, 4:84] += 0.015; rows[:, :2] += 0.9
def score(rows, masks): rows[:, 4:84] += 0.03
def box(rows, masks): rows[:, 0] += 1.5
def swapped(rows, masks): rows[:, 4:84] = rows[:, 4:84].roll(1, 1)
def mask(rows, masks): masks.neg_()
def more(rows, masks): rows[:, 4 + 7, rows[0, 4:84].amax(0).argmin()] = 0.9
def broken(rows, masks): rows[0, 0, 0] = float("nan")

verdicts = {change.__name__: compared(told, changed(change))
            for change in (nothing, nearly, score, box, swapped, mask, more, broken)}
verdicts["shorter"] = vars(parity.compare(told[0], backends.Raw(told[0].predictions[..., :-1]), classes=80))
unsure = [backends.Raw(raw.predictions.clone()) for raw in told]
for raw in unsure:
    raw.predictions[:, 4:84] *= 1e-3
moved = [backends.Raw(raw.predictions.clone()) for raw in unsure]
for raw in moved:
    raw.predictions[:, 1] += 1.5
answers["verdicts"] = {**verdicts, "unsure": compared(unsure, unsure),
                       "unsure, moved": compared(unsure, moved)}

export = root / "model.onnx"
onnx_export.write_onnx(YOLO(str(path)).model, export)
answers["backends"] = {}
asked = {"confidence": 0.2, "iou": 0.5, "max_detections": 300, "masks": True}
for name in ("openvino", "onnxruntime"):
    detector = open_detector(path, Backend(name, "fp32", str(export)), imgsz=96, device="cpu")
    verdict = compared(told, [detector.raw(picture) for picture in pictures])
    for image in (picture(96, 96), picture(300, 200), picture(120, 80)):
        expected, found = reference.detect([image], **asked)[0], detector.detect([image], **asked)[0]
        assert len(expected.scores) == len(found.scores) > 0
        assert sorted(expected.classes) == sorted(found.classes)
        assert np.abs(expected.scores - found.scores).max() < 1e-3
        assert len(found.masks) == len(expected.masks) == len(found.scores)
    together = detector.detect([image, image], **asked)
    assert all(np.array_equal(one.boxes, found.boxes) for one in together)
    answers["backends"][name] = {**verdict, "backend": detector.backend, "memory": detector.memory_bytes}
"""

#: Opens what is no YOLO11 detector, and asks for backends that there are not.
_INVALID = """
torch.save({"model": {"image_encoder.trunk.pos_embed": torch.zeros(1, 2, 3)}}, root / "sam2.pt")
torch.save({"model": YOLO("yolov8n.yaml").model.half(), "train_args": {}}, root / "yolov8.pt")
diverged = YOLO("yolo11n.yaml").model
with torch.no_grad():
    [parameter.fill_(float("nan")) for parameter in diverged.parameters()]
torch.save({"model": diverged.half(), "train_args": {}}, root / "diverged.pt")
misnamed = YOLO("yolo11n.yaml").model
misnamed.names = {0: "bottle"}
torch.save({"model": misnamed.half(), "train_args": {}}, root / "misnamed.pt")
(root / "junk.pt").write_bytes(b"junk" * 100)
(root / "empty.pt").write_bytes(b"")

def refused(task):
    try:
        task()
    except JobError as error:
        return error.to_wire()

answers["refused"] = {
    name: refused(lambda: open_detector(root / f"{name}.pt", TORCH, imgsz=None, device="cpu"))
    for name in ("sam2", "yolov8", "diverged", "misnamed", "junk", "empty", "evil")
}
for backend in (Backend("tensorrt", "fp16", "x.engine"), Backend("abacus", "fp32")):
    answers["refused"][backend.name] = refused(
        lambda: open_detector(path, backend, imgsz=None, device="cpu"))

def choose(name, *candidates):
    choice = Choice(model=root / name, directory=root, imgsz=64, device="cpu", check_stop=lambda: None)
    return choice.among(candidates)

answers["refused"]["choice"] = refused(lambda: choose("junk.pt", "openvino"))
answers["refused"]["candidate"] = refused(lambda: choose(path.name, "abacus"))
answers["tensorrt"] = choose(path.name, "tensorrt")
(root / "answers.json").write_text(json.dumps(answers))
"""


class _Evil:
    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._proof}",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detector")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    """What the scripts found, all in one process: importing torch takes longer than most of them."""
    with zipfile.ZipFile(folder / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"model": _Evil(folder / "ran")}, protocol=2))
        archive.writestr("evil/version", "3\n")
    shared = Path(os.environ.get("RVMCV_SHARED", Path(__file__).parents[3] / "shared"))
    real = {
        str(shared / "models" / model): [str(image) for image in sorted(images.rglob("*.jpg"))[:6]]
        for model, images in (
            ("pet_hdpe_yolo11n.pt", shared / "datasets" / "pet_hdpe_det"),
            ("garbage_yolo11n_seg.pt", shared / "datasets" / "garbage_seg"),
        )
        if (shared / "models" / model).exists()
    }
    done = subprocess.run(
        [sys.executable, "-c", _HEAD + _IDENTICAL + _PARITY + _INVALID, str(folder), json.dumps(real)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((folder / "answers.json").read_text()))


@pytest.mark.parametrize(("name", "task"), [("yolo11n.yaml", "detect"), ("yolo11n-seg.yaml", "segment")])
@pytest.mark.parametrize(("how", "imgsz"), [("strict", 128), ("loose", 96), ("strict, in bits", 128)])
def test_torch_says_to_the_last_bit_what_plain_ultralytics_says(
    told: dict[str, Any], name: str, task: str, how: str, imgsz: int
) -> None:
    answer = told[name][how]

    assert answer["wrong"] == []
    assert answer["detections"] > 20
    assert (answer["masks"] > 0) == (task == "segment")
    assert (answer["task"], answer["imgsz"], len(answer["names"])) == (task, imgsz, 80)
    assert answer["threads_before"] == answer["threads_after"]


@pytest.mark.parametrize("model", ["pet_hdpe_yolo11n.pt", "garbage_yolo11n_seg.pt"])
def test_it_does_with_real_models_on_real_pictures(told: dict[str, Any], shared: Path, model: str) -> None:
    answer = told[str(shared / "models" / model)]

    assert answer["wrong"] == []
    assert answer["detections"] >= 10


def test_masks_of_a_large_picture_are_never_in_memory_together(told: dict[str, Any]) -> None:
    assert max(told["peaks"]) < 60 * 12_000_000 / 2


def test_images_are_letterboxed_as_rectangles(told: dict[str, Any]) -> None:
    assert told["letterboxed"] == [[128, 128], [128, 96], [96, 128], [128, 96], [32, 128], [128, 96]]


def test_parity_is_seen_where_it_is(told: dict[str, Any]) -> None:
    verdicts = told["verdicts"]

    assert verdicts["nothing"]["passed"]
    assert verdicts["nothing"]["detections"] > 20
    assert verdicts["nearly"]["passed"]
    assert verdicts["nearly"]["box_px"] == pytest.approx(0.9, abs=0.01)
    assert verdicts["nearly"]["flips"] > 0
    assert (verdicts["unsure"]["passed"], verdicts["unsure"]["detections"]) == (True, 0)
    assert verdicts["unsure"]["compared"] == 60


@pytest.mark.parametrize(
    "change", ["score", "box", "swapped", "mask", "more", "broken", "shorter", "unsure, moved"]
)
def test_parity_sees_what_changed(told: dict[str, Any], change: str) -> None:
    assert not told["verdicts"][change]["passed"]


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_an_export_says_what_torch_says(told: dict[str, Any], name: str) -> None:
    answer = told["backends"][name]

    assert answer["passed"]
    assert answer["detections"] > 20
    assert answer["score"] < 1e-3
    assert answer["box_px"] < 0.2
    assert answer["backend"] == name
    assert answer["memory"] > 10_000_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sam2", "is a SAM2 checkpoint"),
        ("yolov8", "yolov8n.yaml"),
        ("diverged", "not finite"),
        ("misnamed", "tells 80 classes apart and names 1"),
        ("junk", "junk.pt"),
        ("empty", "empty.pt"),
        ("evil", "evil.pt"),
        ("choice", "junk.pt"),
    ],
)
def test_what_is_no_yolo11_is_refused(told: dict[str, Any], folder: Path, name: str, message: str) -> None:
    error = told["refused"][name]

    assert error is not None
    assert error["code"] == "model_invalid"
    assert message in error["message"]
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["tensorrt", "abacus", "candidate"])
def test_a_backend_that_there_is_not_is_refused(told: dict[str, Any], name: str) -> None:
    assert told["refused"][name]["code"] == "unsupported_job"


def test_where_no_candidate_runs_torch_is_left(told: dict[str, Any]) -> None:
    assert told["tensorrt"]["chosen"] == {"backend": "torch-cpu", "precision": "fp32"}
    assert told["tensorrt"]["files"] == []
    assert "does not run on the device" in told["tensorrt"]["measured"]["tensorrt fp16"]["error"]


def test_the_export_child_chooses_what_agrees_with_torch(
    told: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(folder / "yolo11n-128.pt", tmp_path / "in" / "model.pt")
    child = ComputeChild(
        tmp_path,
        "export",
        {
            "task": "export_model",
            "model": "in/model.pt",
            "imgsz": None,
            "device": "cpu",
            "candidates": ["openvino", "onnxruntime", "torch-cpu"],
        },
    )
    result = child.finish()["result"]
    measured = result["measured"]
    chosen = f"{result['chosen']['backend']} {result['chosen']['precision']}"

    assert measured[chosen]["parity"]
    assert measured[chosen]["ms"] == min(one["ms"] for one in measured.values() if one["parity"])
    assert {"torch-cpu fp32", "onnxruntime fp32"} <= set(measured)
    assert all(one["worst"]["detections"] > 20 for one in measured.values() if one["ms"] is not None)
    assert result["imgsz"] == 128
    assert Choice.parse(result).chosen.backend == result["chosen"]["backend"]
    for file in result["files"]:
        assert (tmp_path / "export" / file["name"]).stat().st_size == file["size_bytes"]
    # No network, and no other program than the one that lists the system's libraries.
    watched = child.watched_file.read_text() if child.watched_file.exists() else ""
    assert [line for line in watched.splitlines() if "ldconfig" not in line] == []
