"""A list of images through the real daemon and its engine: in order, in parts, whatever happens to it."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rvmcv_worker.reference.server import ReferenceServer
from tests import tiny_model
from tests.dataset_fixtures import draw
from tests.file_server import HELD_S, Answer, FileServer, Handler, give, sha256_of, status
from tests.worker_process import WorkerProcess, eventually, still_alive

pytestmark = pytest.mark.slow

MODEL = "tiny_v1"
#: An engine starts within seconds on an idle machine.
PATIENCE_S = 120.0
ASKED = {"model_version": MODEL, "confidence_threshold": tiny_model.ANY_CONFIDENCE, "max_detections": 2}
PICTURE = draw(1, (96, 64))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("model") / "tiny.pt")


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer, tiny: Path) -> ReferenceServer:
    shared_server.add_model(tiny, model_name="yolo11", version=MODEL)
    return shared_server


@pytest.fixture(scope="module")
def files() -> Iterator[FileServer]:
    with FileServer() as running:
        for number in range(100):
            running.on(f"/{number}.jpg", give(draw(number, (96, 64))))
        yield running


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer, files: FileServer
) -> Iterator[WorkerProcess]:
    extra: dict[str, dict[str, object]] = {
        "storage": {"plain_http_hosts": [files.place, "127.0.0.1:9"]},
        "inference": {"max_image_mb": 0.1, "download_threads": 2, "backend": "torch"},
    }
    directory = tmp_path_factory.mktemp("worker")
    with WorkerProcess(directory, server, job_types=("batch-inference",), scale=0.02, extra=extra) as running:
        yield running


def _images(files: FileServer, count: int) -> list[dict[str, Any]]:
    return [{"id": f"picture-{number}", "url": f"{files.url}/{number}.jpg"} for number in range(count)]


def _manifest(server: ReferenceServer, tmp_path: Path, *lines: bytes) -> dict[str, str]:
    file = tmp_path / "manifest.jsonl"
    file.write_bytes(b"\n".join(lines))
    return {
        "manifest_url": server.put_object("datasets", f"{tmp_path.name}.jsonl", file),
        "manifest_sha256": sha256_of(file.read_bytes()),
    }


def _lines(server: ReferenceServer, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Every line of every part, in the order of the parts; their hashes and counts are right."""
    lines = []
    for part in job["result"]["parts"]:
        content = server.read_object(part["path"])
        assert hashlib.sha256(content).hexdigest() == part["sha256"]
        found = [json.loads(line) for line in gzip.decompress(content).splitlines()]
        assert len(found) == part["images"]
        lines += found
    return lines


def _held(number: int) -> Answer:
    """Give a picture only when the test lets go."""

    def answer(handler: Handler) -> None:
        handler.server.release.wait(HELD_S)
        give(draw(number, (96, 64)))(handler)

    return answer


def test_one_bad_image_is_one_error_line(
    server: ReferenceServer, worker: WorkerProcess, files: FileServer, tmp_path: Path
) -> None:
    files.on("/text.jpg", give(b"no picture at all"))
    files.on("/large.jpg", give(PICTURE + bytes(200_000)))
    bad = {
        "missing": {"url": f"{files.url}/none.jpg"},
        "text": {"url": f"{files.url}/text.jpg"},
        "large": {"url": f"{files.url}/large.jpg"},
        "forbidden": {"url": "https://elsewhere.example/a.jpg"},
        "other": {"url": f"{files.url}/1.jpg", "sha256": "0" * 64},
        "away": {"url": "http://127.0.0.1:9/a.jpg"},
    }
    lines = [json.dumps(image).encode() for image in _images(files, 9)]
    lines += [json.dumps({"id": name, **image}).encode() for name, image in bad.items()]
    lines += [b'{"id": "line 16", "url": 5}', b'{"id": "line 17", ', lines[3]]
    manifest = _manifest(server, tmp_path, *lines)
    config = {**ASKED, **manifest, "part_size": 7, "purpose": "batch_analysis", "annotated": True}
    job = server.wait_until_final(server.queue_batch(config), PATIENCE_S)
    assert job["status"] == "completed", job["error"]
    told = _lines(server, job)
    assert [line["index"] for line in told] == list(range(18))
    codes = {line["id"]: line["error"]["code"] for line in told if not line["ok"]}
    assert codes == {
        "missing": "image_unavailable",
        "text": "image_invalid",
        "large": "image_invalid",
        "forbidden": "url_forbidden",
        "other": "checksum_mismatch",
        "away": "image_unavailable",
        "line 16": "invalid_job",
        None: "invalid_job",
    }
    assert told[16]["error"]["message"].startswith("line 17: not JSON")
    counted = "images without a result: 8 (image_unavailable 2, image_invalid 2, invalid_job 2"
    assert f"[{job['job_id']}] {counted}" in worker.log()
    assert (told[17]["id"], told[17]["detections"]) == (told[3]["id"], told[3]["detections"])
    assert {tuple(line["image_size"]) for line in told if line["ok"]} == {(96, 64)}
    drawn = {line["annotated_path"] for line in told if line["ok"]}
    assert len(drawn) == 10
    assert {server.read_object(path)[:2] for path in drawn} == {b"\xff\xd8"}
    result = job["result"]
    assert [part["images"] for part in result["parts"]] == [7, 7, 4]
    assert (result["images_total"], result["images_ok"], result["images_failed"]) == (18, 10, 8)
    assert result["errors"] == {
        "image_unavailable": 2,
        "image_invalid": 2,
        "url_forbidden": 1,
        "checksum_mismatch": 1,
        "invalid_job": 2,
    }
    assert sum(result["classes"].values()) == sum(len(line.get("detections", [])) for line in told) == 20
    assert (result["purpose"], result["model_used"], result["backend"]) == (
        "batch_analysis",
        MODEL,
        "torch-cpu",
    )
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p95"] <= result["latency_ms"]["p99"]
    assert [seen.path for seen in files.calls()].count("/none.jpg") == 1
    assert not list((worker.state_dir / "work").glob(f"{job['job_id']}*"))


def test_a_killed_daemon_costs_the_unfinished_part_only(
    server: ReferenceServer, worker: WorkerProcess, files: FileServer
) -> None:
    files.release.clear()
    files.on("/12.jpg", _held(12))
    job_id = server.queue_batch({**ASKED, "images": _images(files, 20), "part_size": 5})
    job = server.wait_for_job(
        job_id, lambda job: (job["checkpoint"] or {}).get("next_index") == 10, PATIENCE_S
    )
    assert (job["progress"]["phase"], job["progress"]["images_total"]) == ("infer", 20)
    family = worker.tree()
    worker.kill()
    psutil.wait_procs(family, timeout=10)
    assert still_alive(family) == []
    files.release.set()
    before = len(files.calls())
    worker.start()
    job = server.wait_until_final(job_id, PATIENCE_S)
    assert (job["status"], job["attempt"]) == ("completed", 2), job["error"]
    assert job["attempts"][0]["error"]["code"] == "worker_died"
    told = _lines(server, job)
    assert [line["index"] for line in told] == list(range(20))
    assert [line["id"] for line in told] == [f"picture-{number}" for number in range(20)]
    parts = [part["path"].split("/")[-2] for part in job["result"]["parts"]]
    assert parts == ["attempt-1", "attempt-1", "attempt-2", "attempt-2"]
    assert job["result"]["images_ok"] == 20
    fetched = {seen.path for seen in files.calls()[before:]}
    assert fetched == {f"/{number}.jpg" for number in range(10, 20)}


def test_a_stop_in_the_middle_of_a_part_takes_along_what_is_done(
    server: ReferenceServer, worker: WorkerProcess, files: FileServer
) -> None:
    files.release.clear()
    files.on("/8.jpg", _held(8))
    job_id = server.queue_batch({**ASKED, "images": _images(files, 12)})
    server.wait_for_job(job_id, lambda job: (job["progress"] or {}).get("images_done") == 8, PATIENCE_S)
    command = [sys.executable, "-m", "rvmcv_worker.cli", "status", "--config", str(worker.config_file)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{job_id}  batch-inference, attempt 1, " in shown
    assert " 67 %  infer, 8 of 12 images, " in shown
    assert worker.stop() == 0
    job = server.job(job_id)
    assert (job["status"], job["attempts"][0]["error"]["code"]) == ("queued", "worker_stopped")
    assert job["checkpoint"]["next_index"] == 8
    files.release.set()
    worker.start()
    job = server.wait_until_final(job_id, PATIENCE_S)
    assert (job["status"], job["attempt"]) == ("completed", 2), job["error"]
    assert [line["index"] for line in _lines(server, job)] == list(range(12))
    assert [part["images"] for part in job["result"]["parts"]] == [8, 4]


def test_a_cancel_ends_a_batch_and_nothing_is_published(
    server: ReferenceServer, worker: WorkerProcess, files: FileServer
) -> None:
    files.release.clear()
    files.on("/2.jpg", _held(2))
    job_id = server.queue_batch({**ASKED, "images": _images(files, 12)})
    server.wait_for_job(job_id, lambda job: (job["progress"] or {}).get("images_done") == 2, PATIENCE_S)
    server.cancel(job_id)
    job = server.wait_until_final(job_id, 10)
    assert (job["status"], job["result"]) == ("cancelled", None)
    files.release.set()


def test_when_no_image_comes_any_more_the_job_goes_back_and_no_line_is_lost(
    server: ReferenceServer, worker: WorkerProcess, files: FileServer
) -> None:
    gone = [{"id": number, "url": f"http://127.0.0.1:9/{number}.jpg"} for number in range(30)]
    images = _images(files, 4) + gone
    job_id = server.queue_batch({**ASKED, "images": images, "part_size": 2})
    job = server.wait_for_job(job_id, lambda job: job["attempts"] and job["attempts"][0]["error"], PATIENCE_S)
    assert job["attempts"][0]["error"]["code"] == "image_unavailable"
    assert "20 images in a row" in job["attempts"][0]["error"]["message"]
    assert job["checkpoint"]["next_index"] >= 4
    assert f"job.handed_back [{job_id}] image_unavailable: 20 images in a row" in worker.log()
    server.cancel(job_id)


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"\x89PNG\r\n\x1a\n", "dataset_invalid", "the manifest is no list of images"),
        (b"", "dataset_invalid", "the manifest names no image"),
        (None, "dataset_unavailable", "there is no such file"),
        (
            b'{"id": 1, "url": "s3://a/b"}\n' * 1001,
            "invalid_job",
            "part_size: 1 would make more than 1000 parts",
        ),
    ],
    ids=["a picture", "empty", "missing", "too many parts"],
)
def test_a_list_that_is_none_ends_the_job(
    server: ReferenceServer,
    worker: WorkerProcess,
    files: FileServer,
    content: bytes | None,
    code: str,
    says: str,
) -> None:
    if content is not None:
        files.on("/list", give(content))
    url = f"{files.url}/{'list' if content is not None else 'no-list'}"
    job_id = server.queue_batch({**ASKED, "manifest_url": url, "part_size": 1})
    job = server.wait_for_job(job_id, lambda job: job["attempts"] and job["attempts"][0]["error"], PATIENCE_S)
    assert job["attempts"][0]["error"]["code"] == code
    assert says in job["attempts"][0]["error"]["message"]
    server.cancel(job_id)


def test_without_storage_no_batch_is_claimed_and_the_worker_says_so(
    server: ReferenceServer, tmp_path: Path
) -> None:
    api = "/api/v1/cv"
    with FileServer() as lacking:  # an RVM-Server without job-uploads
        lacking.on(f"GET {api}/job-status", status(204))
        lacking.on(f"POST {api}/worker-status", status(200, b"{}", Content_Type="application/json"))
        extra: dict[str, dict[str, object]] = {"server": {"poll_wait_s": 0}}
        with WorkerProcess(
            tmp_path,
            server,
            url=lacking.url,
            job_types=("batch-inference", "stub"),
            s3_keys=False,
            scale=0.02,
            extra=extra,
        ):

            def told() -> bool:
                bodies = (seen.body for seen in lacking.calls("POST") if seen.path.endswith("worker-status"))
                claims = {"train": True, "infer": False, "batch": False}
                reason = "batch-inference is not claimed: its results need storage"
                return any(
                    said["claims"] == claims and reason in said["reasons"] for said in map(json.loads, bodies)
                )

            def polls() -> list[str]:
                return [seen.path for seen in lacking.calls() if "lane=" in seen.path]

            eventually(told)
            before = len(polls())
            eventually(lambda: len(polls()) > before + 3)
            assert {path.split("lane=")[1].split("&")[0] for path in polls()} == {"train"}
