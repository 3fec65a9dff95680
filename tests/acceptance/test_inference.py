"""Inference jobs through the real daemon, its engines behind the wall: good answers, and each bad input."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rvmcv_worker.reference.server import ReferenceServer
from tests.worker_process import WorkerProcess, eventually

_TIMEOUT_S = 60.0
Infer = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer, shared: Path) -> ReferenceServer:
    model = shared / "models" / "pet_hdpe_yolo11n.pt"
    shared_server.add_model(model, model_name="yolo11", version="pet_hdpe", active=True)
    return shared_server


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> Iterator[WorkerProcess]:
    """One daemon and its engines for the module, so that each test also shows that the next job runs."""
    with WorkerProcess(
        tmp_path_factory.mktemp("worker"),
        server,
        job_types=("inference",),
        scale=0.01,
        extra={"inference": {"backend": "torch"}, "limits": {"max_image_megapixels": 30.0}},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def bottle(shared: Path) -> Path:
    return min((shared / "datasets" / "pet_hdpe_det" / "images" / "val").glob("HDPE*"))


@pytest.fixture(scope="module")
def put(server: ReferenceServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bytes], str]:
    folder = tmp_path_factory.mktemp("images")

    def put_bytes(name: str, content: bytes) -> str:
        file = folder / name
        file.write_bytes(content)
        return server.put_object("datasets", f"inference/{name}", file)

    return put_bytes


@pytest.fixture(scope="module")
def url(put: Callable[[str, bytes], str], bottle: Path) -> str:
    return put("bottle.jpg", bottle.read_bytes())


@pytest.fixture(scope="module")
def infer(server: ReferenceServer, worker: WorkerProcess) -> Infer:
    """Return what queues one inference and returns its job, ended or handed back once."""

    def run(image_url: str, **config: Any) -> dict[str, Any]:
        job_id = server.queue_inference({"image_url": image_url, "model_version": "pet_hdpe", **config})
        job = server.wait_for_job(
            job_id, lambda job: bool(job["attempts"] and job["attempts"][0]["ended_as"]), _TIMEOUT_S
        )
        if job["status"] in {"queued", "processing"}:
            server.cancel(job_id)
        return job

    return run


def _error(job: dict[str, Any]) -> dict[str, Any]:
    error: dict[str, Any] = job["attempts"][0]["error"]
    return error


def _encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_picture_is_answered_with_what_is_in_it(infer: Infer, url: str, bottle: Path) -> None:
    job = infer(url, confidence_threshold=0.25, purpose="fraud_check")
    assert job["status"] == "completed", job
    result = job["result"]
    assert result["detections"]
    found = result["detections"][0]
    with Image.open(bottle) as image:
        assert result["image_size"] == list(image.size)
    assert 0.25 <= found["confidence"] <= 1
    assert (result["model_used"], result["backend"], result["batch"]) == ("pet_hdpe", "torch-cpu", 1)
    assert {"download", "queue", "decode", "detect", "encode"} <= set(result["timings"])
    assert result["processing_time_ms"] > 0


def test_the_active_model_is_asked_for_where_none_is_named(infer: Infer, url: str, shared: Path) -> None:
    sha256 = hashlib.sha256((shared / "models" / "pet_hdpe_yolo11n.pt").read_bytes()).hexdigest()
    job = infer(url, model_version=None)
    assert job["result"]["model_sha256"] == sha256
    by_hash = infer(url, model_version=None, model_sha256=sha256, model_active=True)
    assert by_hash["result"]["detections"] == job["result"]["detections"]


def test_approved_and_other_models_run_in_processes_of_their_own(
    infer: Infer, url: str, server: ReferenceServer, worker: WorkerProcess
) -> None:
    infer(url)
    infer(url, model_active=True)
    engines = [process for process in worker.tree() if process.cmdline()[-1:] == ["engine"]]
    assert sum("bwrap" not in process.name() for process in engines) == 2


def test_what_the_machine_saw_is_compared(infer: Infer, url: str) -> None:
    seen = infer(url)["result"]["detections"]
    alike = [{"class": one["class"], "confidence": one["confidence"], "bbox": one["bbox"]} for one in seen]
    comparison = infer(url, edge_result={"detections": alike})["result"]["comparison"]
    assert (comparison["mismatch"], comparison["mean_iou"]) == (False, 1.0)
    other = [{**alike[0], "class": "can"}, *alike[1:]]
    comparison = infer(url, edge_result={"detections": other})["result"]["comparison"]
    assert [reason["code"] for reason in comparison["reasons"]] == ["class_differs"]


@pytest.mark.slow
def test_masks_too_large_for_a_report_go_to_storage(
    infer: Infer, put: Callable[[str, bytes], str], server: ReferenceServer, shared: Path
) -> None:
    model = shared / "models" / "garbage_yolo11n_seg.pt"
    server.add_model(model, model_name="yolo11", version="garbage_seg")
    picture = min((shared / "datasets" / "garbage_seg" / "images" / "val").glob("*.jpg"))
    job = infer(
        put("garbage.jpg", picture.read_bytes()),
        model_version="garbage_seg",
        segmentation=True,
        segmenter="yolo",
        confidence_threshold=0.0001,
        iou_threshold=1.0,
        max_detections=1000,
    )
    assert job["status"] == "completed", job["error"]
    result = job["result"]
    assert result["segmenter_used"] == "yolo"
    assert not [found for found in result["detections"] if "segmentation" in found]
    content = server.read_object(result["result_path"])
    assert hashlib.sha256(content).hexdigest() == result["sha256"]
    whole = json.loads(content)
    assert [found.pop("segmentation")[:8] for found in whole["detections"]] == ["iVBORw0K"] * len(
        result["detections"]
    )
    assert whole["detections"] == result["detections"]


@pytest.mark.parametrize("name", ["grey", "cmyk", "sixteen-bit", "animated", "turned"])
def test_odd_pictures_are_answered(
    infer: Infer, put: Callable[[str, bytes], str], bottle: Path, name: str
) -> None:
    with Image.open(bottle) as picture:
        image = picture.resize((320, 240))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = {
        "grey": lambda: _encoded(image.convert("L")),
        "cmyk": lambda: _encoded(image.convert("CMYK")),
        "sixteen-bit": lambda: _encoded(image.convert("L").convert("I;16"), "PNG"),
        "animated": lambda: _encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "turned": lambda: _encoded(image, exif=exif),
    }[name]()
    job = infer(put(name, content))
    if name == "animated" and job["status"] == "failed":
        assert _error(job)["code"] == "image_invalid"
        return
    assert job["status"] == "completed", job
    assert job["result"]["image_size"] == ([240, 320] if name == "turned" else [320, 240])


def _huge_png() -> bytes:
    """A PNG that says it has 50,000 x 50,000 pixels."""
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_what_is_no_picture_is_invalid(
    infer: Infer, put: Callable[[str, bytes], str], bottle: Path, url: str
) -> None:
    for name, content in {
        "text": b"I am no picture",
        "empty": b"",
        "huge": _huge_png(),
        "cut-off": bottle.read_bytes()[:3000],
    }.items():
        stored = put(name, content)
        job = infer(stored)
        assert (job["status"], _error(job)["code"]) == ("failed", "image_invalid"), (name, job)
        assert stored in _error(job)["message"]
    assert infer(url)["status"] == "completed"


def test_a_picture_that_is_not_to_be_had_says_so(infer: Infer, url: str) -> None:
    assert _error(infer("s3://datasets/none.jpg"))["code"] == "image_unavailable"
    assert _error(infer("https://169.254.169.254/a.jpg"))["code"] == "url_forbidden"
    assert _error(infer(url, image_sha256="0" * 64))["code"] == "checksum_mismatch"


def test_a_config_that_is_wrong_is_refused_with_its_field(infer: Infer, url: str) -> None:
    error = _error(infer(url, confidence_threshold=1.5))
    assert error["code"] == "invalid_job"
    assert "config.confidence_threshold" in error["message"]


class _RunsCode:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


def _checkpoint(content: object) -> bytes:
    """A file in torch's format whose pickle holds `content`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def test_a_model_that_cannot_be_used_says_why(
    infer: Infer, url: str, server: ReferenceServer, tmp_path: Path, worker: WorkerProcess
) -> None:
    marker = tmp_path / "it-ran"
    for version, content in {
        "runs-code": _checkpoint({"model": _RunsCode(marker)}),
        "segmenter": _checkpoint({"model": {"image_encoder.trunk.pos_embed": 0}}),
        "rubbish": b"no model at all",
    }.items():
        file = tmp_path / f"{version}.pt"
        file.write_bytes(content)
        server.add_model(file, model_name="yolo11", version=version)
        job = infer(url, model_version=version)
        assert (job["status"], _error(job)["code"]) == ("failed", "model_invalid"), (version, job)
    assert not marker.exists()
    assert _error(infer(url, model_version="no-such-version"))["code"] == "model_unavailable"
    assert infer(url)["status"] == "completed"


def test_the_status_shows_the_engines(
    worker: WorkerProcess, server: ReferenceServer, infer: Infer, url: str
) -> None:
    infer(url)
    command = [sys.executable, "-m", "rvmcv_worker.cli", "status", "--config", str(worker.config_file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "engine  other models: idle on cpu" in said
    eventually(lambda: any(e["answered"] for e in server.workers()[0]["status"]["engines"]))


def test_nothing_of_a_job_is_left(worker: WorkerProcess) -> None:
    kept = {path.name for path in (worker.state_dir / "work").iterdir()}
    assert kept <= {"_engine-approved", "_engine-other"}


def test_a_stop_takes_the_engines_along(server: ReferenceServer, worker: WorkerProcess) -> None:
    family = worker.tree()
    assert family
    assert worker.stop(60) == 0
    eventually(lambda: not any(process.is_running() for process in family))
    assert worker.workspace_files() == []
