"""What people see of batches, inferences and alerts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings
from tests.reference_talker import Talker

HOSTILE = "<script>alert(1)</script>"
HOSTILE_TEXT = "&lt;script&gt;alert(1)&lt;/script&gt;"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceServer]:
    file = tmp_path_factory.mktemp("model") / "m.pt"
    file.write_bytes(b"model")
    with ReferenceServer(reap=False, settings=Settings(shard_size=2)) as running:
        running.add_model(file, model_name="yolo11", version="v3", active=True)
        yield running


@pytest.fixture(scope="module")
def worker(server: ReferenceServer) -> Talker:
    return Talker(server)


def page(server: ReferenceServer, path: str) -> str:
    answer = requests.get(server.url + path, auth=("any", server.admin_token), timeout=20)
    assert answer.status_code == 200, answer.text
    assert "<script" not in answer.text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    return answer.text


def test_pages_say_that_there_is_nothing_yet(tmp_path: Path) -> None:
    with ReferenceServer(tmp_path, reap=False) as empty:
        for path in ("/batches", "/logs", "/alerts"):
            assert "None" in page(empty, path)
        assert requests.get(empty.url + "/alerts", timeout=10).status_code == 401


def test_batch_shows_what_is_missing(server: ReferenceServer, worker: Talker) -> None:
    images = [{"id": number, "url": "s3://datasets/x.jpg"} for number in range(5)]
    batch_id = server.request_batch(images=images)
    assert "0 of 5" in page(server, "/batches")
    shards = [shard["job_id"] for shard in server.batch(batch_id)["shards"]]
    for job_id in shards[:2]:
        result = {
            "images_ok": 1,
            "images_failed": 1,
            "errors": {"image_invalid": 1},
            "classes": {HOSTILE: 3},
            "parts": [{"path": f"s3://artifacts/{job_id}.gz", "sha256": "0" * 64, "images": 2}],
            "latency_ms": {"p50": 7.0, "p95": 9.0, "p99": 9.5},
        }
        worker.finish(job_id, worker.take(job_id), "completed", result=result)
    error = {"code": "upload_failed", "message": HOSTILE}
    worker.finish(shards[2], worker.take(shards[2]), "failed", error=error)
    text = page(server, f"/batch?batch_id={batch_id}")
    assert "completed_with_errors" in text
    assert "images 4 to\n4 (shard 2)" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;</td><td>6" in text
    assert f"s3://artifacts/{shards[1]}.gz" in text
    assert "at most" in text
    assert "2 images with a result, 2 without" in page(server, "/logs")
    login = ("any", server.admin_token)
    assert requests.get(server.url + "/batch?batch_id=none", auth=login, timeout=10).status_code == 404


def test_mismatch_is_on_both_pages(server: ReferenceServer, worker: Talker) -> None:
    job_id = server.request_inference(image_url="s3://datasets/x.jpg", purpose="fraud_check")
    result = {
        "detections": [
            {"class": HOSTILE, "confidence": 0.5931379795074463, "bbox": [0, 0, 1, 1]},
            {"class": HOSTILE, "confidence": "sure", "bbox": None},
        ],
        "comparison": {"mismatch": True, "reasons": [{"code": "x", "message": HOSTILE}]},
        "processing_time_ms": 152,
    }
    worker.finish(job_id, worker.take(job_id), "completed", result=result)
    text = page(server, "/logs")
    assert ">differ<" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 0.59," in text
    assert f"{HOSTILE_TEXT} sure" in text
    assert "<td>152</td>" in text
    assert re.search(r'<time datetime="[^"]+Z">\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ</time>', text)
    text = page(server, "/alerts")
    assert "mismatch" in text
    assert f"/job?job_id={job_id}" in text


def test_jobs_show_why_one_waits_again(server: ReferenceServer, worker: Talker) -> None:
    job_id = server.request_inference(image_url="s3://datasets/none.jpg")
    error = {"code": "image_unavailable", "message": HOSTILE}
    worker.finish(job_id, worker.take(job_id), "queued", error=error)
    assert "handed back: image_unavailable" in page(server, "/jobs")
    done = server.request_inference(image_url="s3://datasets/x.jpg")
    token = worker.take(done)
    worker.progress(done, token, 1, phase="infer", fraction=0.0)
    assert "0 % infer" in page(server, "/jobs")
    worker.finish(done, token, "completed", result={})
    assert "0 % infer" not in page(server, "/jobs")


def test_batch_that_only_its_worker_has_counted(server: ReferenceServer, worker: Talker) -> None:
    batch_id = server.request_batch(manifest_url="https://elsewhere/list.jsonl")
    assert "an unknown number of" in page(server, f"/batch?batch_id={batch_id}")
    away = {"code": "dataset_unavailable", "message": HOSTILE}
    worker.finish(batch_id, worker.take(batch_id), "queued", error=away, retry_after_s=0)
    text = page(server, f"/batch?batch_id={batch_id}")
    assert f"handed back: <code>dataset_unavailable</code> {HOSTILE_TEXT}" in text
    assert server.batch(batch_id)["shards"][0]["handed_back"] == away
    error = {"code": "dataset_invalid", "message": "no list"}
    worker.finish(batch_id, worker.take(batch_id), "failed", error=error)
    assert "images 0 to\nthe end" in page(server, f"/batch?batch_id={batch_id}")
