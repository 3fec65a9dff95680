"""A real engine on real models: what it answers, in which order, and how it ends."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from rvmcv_worker.compute.image_decode import decode
from rvmcv_worker.engine_wire import Backend, MaskFormat, Model, Options, Queue, Request, Segmenter
from tests import sam2_files
from tests.dataset_fixtures import draw
from tests.engine_child import EngineChild

pytestmark = pytest.mark.slow

TORCH = Backend("torch-cpu", "fp32")
#: What is asked of plain Ultralytics and of the engine alike.
ASKED: dict[str, tuple[str, Options]] = {
    "as the model says": ("second.pt", Options(confidence=0.1)),
    "strict": ("second.pt", Options(confidence=0.15, iou=0.3, max_detections=3)),
    "small": ("first.pt", Options(confidence=0.05, imgsz=64)),
    "masks": ("segment.pt", Options(max_detections=5, segmentation=True, mask_format=MaskFormat.PNG)),
}


def model_of(root: Path, name: str) -> Model:
    path = f"in/{name}"
    return Model(hashlib.sha256((root / path).read_bytes()).hexdigest(), path, TORCH)


def pictures() -> dict[str, bytes]:
    """Pictures of several shapes and kinds; all formats keep all of what is drawn."""
    drawn = {
        f"{number}.jpg": draw(number, size) for number, size in enumerate([(96, 64), (64, 96), (200, 150)])
    }
    drawn["screen.png"] = draw(7, (120, 90), "PNG")
    with Image.open(io.BytesIO(draw(8, (100, 80)))) as image:
        turned, grey, ink = io.BytesIO(), io.BytesIO(), io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(turned, "JPEG", exif=exif)
        image.convert("L").save(grey, "JPEG")
        image.convert("CMYK").save(ink, "JPEG")
    return {
        **drawn,
        "turned.jpg": turned.getvalue(),
        "grey.jpg": grey.getvalue(),
        "ink.jpg": ink.getvalue(),
    }


class Stage:
    """Models and pictures, what plain Ultralytics says of them, and an engine."""

    def __init__(self, root: Path, shared: Path | None) -> None:
        self.root = root
        for name in ("in", "pictures"):
            (root / name).mkdir()
        self.pictures = pictures()
        if shared:
            real = sorted((shared / "datasets" / "coco8").rglob("*.jpg"))[:3]
            self.pictures |= {f"real-{path.name}": path.read_bytes() for path in real}
        for name, content in self.pictures.items():
            (root / "pictures" / name).write_bytes(content)
        asked = {
            name: {
                "model": model,
                "options": {
                    "conf": options.confidence,
                    "iou": options.iou,
                    "max_det": options.max_detections,
                    **({"imgsz": options.imgsz} if options.imgsz else {}),
                },
            }
            for name, (model, options) in ASKED.items()
        }
        (root / "asked.json").write_text(json.dumps(asked))
        subprocess.run(
            [sys.executable, "-m", "tests.plain_ultralytics", str(root)],
            cwd=Path(__file__).parents[2],
            check=True,
            timeout=300,
        )
        self.said: dict[str, Any] = json.loads((root / "said.json").read_text())
        self.engine = EngineChild(root)
        self.engine.ready()
        self._last_id = 0

    def request(self, asked: str, queue: Queue = Queue.INTERACTIVE, **changed: Any) -> Request:
        """Return a request of a number of its own for one of `ASKED`."""
        self._last_id += 1
        model, options = ASKED[asked]
        request = Request(self._last_id, queue, model_of(self.root, model), options)
        return dataclasses.replace(request, **changed)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    shared = Path(os.environ.get("RVMCV_SHARED", Path(__file__).parents[3] / "shared"))
    running = Stage(tmp_path_factory.mktemp("engine"), shared if shared.is_dir() else None)
    yield running
    running.engine.close()


def seen(result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the detections of a result without their masks."""
    assert result is not None
    return [
        {key: value for key, value in detection.items() if key != "segmentation"}
        for detection in result["detections"]
    ]


@pytest.mark.parametrize("asked", ASKED)
def test_an_engine_says_what_ultralytics_says_of_the_same_bytes(stage: Stage, asked: str) -> None:
    found = 0
    for name, content in stage.pictures.items():
        answered = stage.engine.infer(stage.request(asked), content)
        expected = stage.said[asked][name]
        assert answered.result is not None, answered.header
        assert answered.result["image_size"] == expected["size"]
        assert seen(answered.result) == expected["detections"], name
        pixels = decode(content, 25_000_000)
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == expected["pixels"]
        assert answered.result["backend"] == "torch-cpu"
        assert answered.result["batch"] == 1
        found += len(expected["detections"])
    assert found >= len(stage.pictures)


def test_a_segmentation_model_gives_its_own_masks(stage: Stage) -> None:
    for name, content in stage.pictures.items():
        answered = stage.engine.infer(stage.request("masks"), content)
        assert answered.result is not None
        masks = [
            cv2.imdecode(
                np.frombuffer(base64.b64decode(detection["segmentation"]), np.uint8), cv2.IMREAD_UNCHANGED
            )
            > 0
            for detection in answered.result["detections"]
        ]
        hashes = [hashlib.sha256(mask.tobytes()).hexdigest() for mask in masks]
        assert hashes == stage.said["masks"][name]["masks"]


@pytest.mark.parametrize("asked", ["strict", "masks"])
def test_a_drawn_picture_comes_with_the_result_that_comes_without_it(stage: Stage, asked: str) -> None:
    plain = stage.request(asked)
    without = stage.engine.infer(plain, stage.pictures["2.jpg"])
    drawn = stage.request(asked, options=dataclasses.replace(plain.options, annotated=True))
    answered = stage.engine.infer(drawn, stage.pictures["2.jpg"])
    assert without.picture == b""
    assert answered.result is not None
    assert without.result is not None
    assert answered.result["detections"] == without.result["detections"]
    with Image.open(io.BytesIO(answered.picture), formats=["JPEG"]) as picture:
        picture.load()


def test_stages_and_timings_tell_what_was_done(stage: Stage) -> None:
    model = model_of(stage.root, "first.pt")
    copy = dataclasses.replace(model, sha256="f" * 64)  # a model that the engine has not seen
    first = stage.engine.infer(stage.request("small", model=copy), stage.pictures["0.jpg"])
    again = stage.engine.infer(stage.request("small", model=copy), stage.pictures["0.jpg"])
    assert first.stages == ["decode", "load", "infer"]
    assert again.stages == ["decode", "infer"]
    assert first.result is not None
    assert again.result is not None
    timings = first.result["timings"]
    assert list(timings) == ["queue", "decode", "load", "detect", "segment", "encode"]
    assert all(seconds >= 0 for seconds in timings.values())
    assert timings["load"] > again.result["timings"]["load"]


def test_two_streams_with_options_of_their_own_are_never_mixed(stage: Stage) -> None:
    """Ultralytics' own model, shared by two threads, uses the other's options nearly each time."""
    names = list(stage.pictures)
    sent: dict[int, tuple[str, str]] = {}
    for number in range(80):
        for asked, queue in (("as the model says", Queue.BATCH), ("strict", Queue.INTERACTIVE)):
            request = stage.request(asked, queue)
            sent[request.id] = asked, names[number % len(names)]
            stage.engine.ask(request, stage.pictures[sent[request.id][1]])
    for _ in range(160):
        answered = stage.engine.answer()
        asked, picture = sent.pop(answered.header["id"])
        assert seen(answered.result) == stage.said[asked][picture]["detections"], (asked, picture)
    assert sent == {}


def test_an_interactive_request_does_not_wait_for_a_batch(stage: Stage) -> None:
    batch = [stage.request("as the model says", Queue.BATCH) for _ in range(30)]
    for request in batch:
        stage.engine.ask(request, stage.pictures["2.jpg"])
    urgent = stage.request("as the model says")
    stage.engine.ask(urgent, stage.pictures["0.jpg"])
    order = [stage.engine.answer().header["id"] for _ in range(31)]
    assert [number for number in order if number != urgent.id] == [request.id for request in batch]
    assert order.index(urgent.id) < 25


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (b"", "the file is empty"),
        (b"<html></html>", "not an image"),
        (draw(1)[:-40], "cannot be decoded to its end"),
    ],
)
def test_a_bad_image_fails_alone(stage: Stage, image: bytes, told: str) -> None:
    good, bad = stage.request("strict"), stage.request("strict")
    stage.engine.ask(bad, image)
    stage.engine.ask(good, stage.pictures["0.jpg"])
    answers = {answered.header["id"]: answered for answered in (stage.engine.answer(), stage.engine.answer())}
    assert answers[bad.id].error["code"] == "image_invalid"
    assert told in answers[bad.id].error["message"]
    assert seen(answers[good.id].result) == stage.said["strict"]["0.jpg"]["detections"]


def test_a_bad_model_fails_alone(stage: Stage) -> None:
    (stage.root / "in" / "rubbish.pt").write_bytes(b"this is no checkpoint")
    good = stage.request("strict")
    bad = stage.request("strict", model=model_of(stage.root, "rubbish.pt"))
    stage.engine.ask(bad, stage.pictures["0.jpg"])
    stage.engine.ask(good, stage.pictures["0.jpg"])
    failed, answered = stage.engine.answer(), stage.engine.answer()
    assert failed.header["id"] == bad.id
    assert failed.error["code"] == "model_invalid"
    assert "rubbish.pt" in failed.error["message"]
    assert str(stage.root) not in failed.error["message"]
    assert seen(answered.result) == stage.said["strict"]["0.jpg"]["detections"]


def test_torch_answers_where_an_export_does_not_run(stage: Stage) -> None:
    (stage.root / "in" / "model.onnx").write_bytes(b"this is no network")
    for name in ("openvino", "onnxruntime"):
        model = model_of(stage.root, "second.pt")
        model = dataclasses.replace(model, backend=Backend(name, "fp32", "in/model.onnx"))
        answers = [
            stage.engine.infer(stage.request("strict", model=model), stage.pictures["0.jpg"])
            for _ in range(2)
        ]
        for answered in answers:
            assert seen(answered.result) == stage.said["strict"]["0.jpg"]["detections"]
            assert answered.result is not None
            assert answered.result["backend"] == "torch-cpu"
        assert answers[1].stages == ["decode", "infer"]  # nothing is tried again


def test_a_detect_model_has_no_masks_of_its_own(stage: Stage) -> None:
    request = stage.request("strict", options=Options(segmentation=True))
    error = stage.engine.infer(request, stage.pictures["0.jpg"]).error
    assert error["code"] == "unsupported_job"
    assert "detect model" in error["message"]


def test_a_segmenter_makes_the_masks_and_keeps_what_it_knows_of_a_picture(stage: Stage) -> None:
    """Its weights are random: what is looked at is who made which mask, and what a second question costs."""
    sam2_files.save(stage.root / "in" / "sam2.pt")
    segmenter = Segmenter("5" * 64, "in/sam2.pt")
    options = Options(confidence=0.1, max_detections=3, segmentation=True, mask_format=MaskFormat.RLE)
    plain = stage.engine.infer(
        stage.request("strict", options=dataclasses.replace(options, segmentation=False)),
        stage.pictures["2.jpg"],
    )
    first, again = (
        stage.engine.infer(
            stage.request("strict", options=options, segmenter=segmenter), stage.pictures["2.jpg"]
        ).result
        for _ in range(2)
    )
    assert first is not None
    assert again is not None
    assert seen(first) == seen(plain.result)
    assert len(seen(first)) > 0
    assert {tuple(found["segmentation"]["size"]) for found in first["detections"]} == {(150, 200)}
    assert again["detections"] == first["detections"]
    assert again["timings"]["segment"] < first["timings"]["segment"]


def test_what_does_not_fit_into_memory_fails_alone(stage: Stage) -> None:
    """The kernel refuses the engine more address space, as it does when memory has run out."""
    engine = stage.engine
    # Larger than jobs may ask for: more than what the engine has free from earlier requests.
    big = stage.request("small", options=Options(imgsz=8192))
    pid = engine.process.pid
    held_bytes = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    unlimited = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (held_bytes + 60_000_000, unlimited[1]))
    try:
        failed = engine.infer(big, stage.pictures["0.jpg"])
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, unlimited)
    assert failed.error["code"] == "out_of_memory"
    answered = engine.infer(stage.request("strict"), stage.pictures["0.jpg"])
    assert seen(answered.result) == stage.said["strict"]["0.jpg"]["detections"]


@pytest.fixture
def engine_root(stage: Stage, tmp_path: Path) -> Path:
    shutil.copytree(stage.root / "in", tmp_path / "in")
    return tmp_path


def test_with_little_memory_only_the_model_in_use_stays(stage: Stage, engine_root: Path) -> None:
    engine = EngineChild(engine_root, memory_bytes=1)
    try:
        engine.ready()
        loaded = [
            "load" in engine.infer(stage.request(asked), stage.pictures["0.jpg"]).stages
            for asked in ("strict", "strict", "small", "strict")
        ]
    finally:
        engine.close()
    assert loaded == [True, False, True, True]


def wait_for_infer(engine: EngineChild, number: int) -> None:
    while engine.frame()[0] != {"id": number, "stage": "infer"}:
        pass


@pytest.mark.parametrize("how", ["SIGTERM", "end of stream"])
def test_an_engine_ends_at_once_also_while_it_computes(stage: Stage, engine_root: Path, how: str) -> None:
    engine = EngineChild(engine_root)
    try:
        engine.ready()
        for _ in range(5):
            request = stage.request("small", options=Options(imgsz=2048))
            engine.ask(request, stage.pictures["0.jpg"])
        wait_for_infer(engine, request.id - 4)
        started_s = time.monotonic()
        if how == "SIGTERM":
            engine.process.send_signal(signal.SIGTERM)
        else:
            engine.hang_up()
        assert engine.process.wait(timeout=30) == 0
        # One picture of 2048 pixels takes longer.
        assert time.monotonic() - started_s < 2.0
    finally:
        engine.close()
