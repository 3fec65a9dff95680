"""Batches: cut into shards, done by several talkers, put together again."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings
from tests.reference_talker import FakeClock, Talker, headers

SHARD_SIZE = 100


@pytest.fixture(scope="module")
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="module")
def server(
    clock: FakeClock, database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReferenceServer]:
    file = tmp_path_factory.mktemp("model") / "m.pt"
    file.write_bytes(b"model")
    settings = Settings(shard_size=SHARD_SIZE, batch_limit_images=1000, manifest_limit_bytes=200_000)
    with ReferenceServer(reap=False, database_url=database_url, clock=clock, settings=settings) as made:
        made.add_model(file, model_name="yolo11", version="v3", active=True)
        yield made


@pytest.fixture
def worker(server: ReferenceServer) -> Talker:
    server.reap()
    return Talker(server, "batch-inference")


def call(server: ReferenceServer, method: str, path: str, **options: Any) -> requests.Response:
    url = f"{server.url}/api/v1/cv/{path}"
    return requests.request(method, url, headers=headers(server.admin_token), timeout=30, **options)


def images(count: int) -> list[dict[str, Any]]:
    return [{"id": f"image {number}", "url": f"s3://datasets/{number}.jpg"} for number in range(count)]


def lines(count: int) -> bytes:
    return b"".join(json.dumps(image).encode() + b"\n" for image in images(count))


def summary(ok: int, failed: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "images_total": ok + failed,
        "images_ok": ok,
        "images_failed": failed,
        "errors": {"image_invalid": failed} if failed else {},
        "classes": {"PET": ok, "HDPE": 1},
        "backends": {"torch-cpu fp32": ok},
        "parts": [{"path": f"s3://artifacts/{uuid.uuid4()}", "sha256": "0" * 64, "images": ok + failed}],
        "images_per_s": 10.0,
        "latency_ms": {"p50": 10.0, "p95": 20.0, "p99": None},
        "model_used": "v3",
        "model_sha256": "1" * 64,
        **fields,
    }


def shards_of(server: ReferenceServer, batch_id: str) -> list[str]:
    return [shard["job_id"] for shard in server.batch(batch_id)["shards"]]


def complete(worker: Talker, job_id: str, result: dict[str, Any]) -> None:
    answer = worker.finish(job_id, worker.take(job_id), "completed", result=result)
    assert answer.status_code == 200, answer.text


def logs_of(server: ReferenceServer, batch_id: str) -> list[dict[str, Any]]:
    return [log for log in server.inference_logs() if log["job_id"].startswith(batch_id)]


def test_small_batch_is_one_job_with_its_images(server: ReferenceServer, worker: Talker) -> None:
    body = {"images": images(3), "confidence_threshold": 0.5, "part_size": 2}
    answer = call(server, "POST", "batch-inference", json=body)
    assert answer.status_code == 202, answer.text
    told = answer.json()
    assert (told["images_total"], told["shards"]) == (3, 1)
    offered = {job["job_id"]: job["config"] for job in worker.poll(lane="batch", slots=100)}
    assert offered[told["batch_id"]] == {
        **body,
        "purpose": "batch_analysis",
        "segmentation": False,
        "annotated": False,
        "model_version": "v3",
        "model_sha256": hashlib.sha256(b"model").hexdigest(),
        "model_active": True,
    }
    complete(worker, told["batch_id"], summary(2, 1))
    shown = requests.get(server.url + told["url"], headers=headers(server.admin_token), timeout=10).json()
    assert (shown["status"], shown["images_done"]) == ("completed", 3)
    assert (shown["summary"]["latency_is"], shown["summary"]["latency_ms"]["p95"]) == ("exact", 20.0)
    (log,) = logs_of(server, told["batch_id"])
    assert (log["job_id"], log["purpose"], log["detections"]) == (told["batch_id"], "batch_analysis", [])
    assert log["summary"]["images_failed"] == 1
    assert "parts" not in log["summary"]


@pytest.mark.parametrize("way", ["list", "storage", "form"])
def test_long_batch_is_cut_and_loses_no_image(
    server: ReferenceServer, worker: Talker, tmp_path: Path, way: str
) -> None:
    count = 2 * SHARD_SIZE + 30
    if way == "list":
        answer = call(server, "POST", "batch-inference", json={"images": images(count)})
    elif way == "storage":
        (tmp_path / "list").write_bytes(lines(count))
        url = server.put_object("datasets", "list.jsonl", tmp_path / "list")
        answer = call(server, "POST", "batch-inference", json={"manifest_url": url})
    else:
        form = {"data": {"part_size": "50"}, "files": {"manifest": ("list.jsonl", lines(count))}}
        answer = call(server, "POST", "batch-inference", **form)
    assert answer.status_code == 202, answer.text
    batch_id = answer.json()["batch_id"]
    batch = server.batch(batch_id)
    assert (batch["images_total"], batch["status"]) == (count, "queued")
    assert [shard["images"] for shard in batch["shards"]] == [SHARD_SIZE, SHARD_SIZE, 30]
    assert [shard["first_index"] for shard in batch["shards"]] == [0, SHARD_SIZE, 2 * SHARD_SIZE]
    listed = b""
    for job_id in shards_of(server, batch_id):
        config = server.job(job_id)["config"]
        got = worker.http.get(server.url + config["manifest_url"], timeout=10).content
        assert hashlib.sha256(got).hexdigest() == config["manifest_sha256"]
        assert "images" not in config
        listed += got
    assert [json.loads(line) for line in listed.splitlines()] == images(count)


def test_shards_are_shared_and_put_together(server: ReferenceServer, clock: FakeClock) -> None:
    workers = [Talker(server, "batch-inference") for _ in range(3)]
    batch_id = server.request_batch(images=images(250))
    shards = shards_of(server, batch_id)
    tokens = [worker.take(job_id) for worker, job_id in zip(workers, shards, strict=True)]
    workers[0].progress(shards[0], tokens[0], 1, images_done=40, images_total=100)
    running = call(server, "GET", f"batch/{batch_id}").json()
    assert (running["status"], running["images_done"], running["summary"]) == ("processing", 40, None)
    clock.advance(10)
    results = [summary(99, 1), summary(100), summary(48, 2)]
    results[2]["latency_ms"] = {"p50": 30.0, "p95": 35.0, "p99": 50.0}
    # The last first: results are put together in the order of the list.
    for number in (2, 0, 1):
        workers[number].finish(shards[number], tokens[number], "completed", result=results[number])
    batch = server.batch(batch_id)
    assert (batch["status"], batch["images_done"]) == ("completed", 250)
    whole = batch["summary"]
    assert (whole["images_ok"], whole["images_failed"], whole["errors"]) == (247, 3, {"image_invalid": 3})
    assert whole["classes"] == {"PET": 247, "HDPE": 3}
    assert whole["images_per_s"] == 25.0
    assert [part["path"] for part in whole["parts"]] == [result["parts"][0]["path"] for result in results]
    assert [part["first_index"] for part in whole["parts"]] == [0, 100, 200]
    # No percentile of the whole is above the largest of its parts; what a part does not tell is not known.
    assert whole["latency_is"] == "upper_bound"
    assert whole["latency_ms"] == {"p50": 30.0, "p95": 35.0, "p99": None}
    assert whole["missing"] == []
    assert len(logs_of(server, batch_id)) == 1


def test_percentiles_of_histograms_are_those_of_all_images(server: ReferenceServer, worker: Talker) -> None:
    batch_id = server.request_batch(images=images(150))
    first, second = shards_of(server, batch_id)
    shape = {"least_ms": 1.0, "growth": 1.1}
    complete(worker, first, summary(100, latency_histogram={**shape, "buckets": {"10": 100}}))
    complete(worker, second, summary(50, latency_histogram={**shape, "buckets": {"10": 41, "30": 9}}))
    whole = server.batch(batch_id)["summary"]
    low, high = float(f"{1.1**9.5:.3g}"), float(f"{1.1**29.5:.3g}")
    assert whole["latency_is"] == "histogram"
    # Nine of 150 are slow: below the 95th percentile's share by none, above it by 1.5.
    assert whole["latency_ms"] == {"p50": low, "p95": high, "p99": high}


def test_failed_shard_is_named_with_what_is_missing(server: ReferenceServer, worker: Talker) -> None:
    batch_id = server.request_batch(images=images(130))
    first, second = shards_of(server, batch_id)
    complete(worker, first, summary(100))
    error = {"code": "upload_failed", "message": "storage is away"}
    worker.finish(second, worker.take(second), "failed", error=error)
    batch = server.batch(batch_id)
    assert batch["status"] == "completed_with_errors"
    assert batch["images_done"] == 100
    assert batch["summary"]["images_ok"] == 100
    (missing,) = batch["summary"]["missing"]
    assert (missing["job_id"], missing["first_index"], missing["images"]) == (second, 100, 30)
    assert missing["error"] == error


def test_batch_without_a_completed_shard_has_failed(server: ReferenceServer, worker: Talker) -> None:
    batch_id = server.request_batch(images=images(130))
    for job_id in shards_of(server, batch_id):
        error = {"code": "model_invalid", "message": "no checkpoint"}
        worker.finish(job_id, worker.take(job_id), "failed", error=error)
    batch = server.batch(batch_id)
    assert (batch["status"], len(batch["summary"]["missing"])) == ("failed", 2)
    assert logs_of(server, batch_id) == []


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"images_ok": 1},
        {**summary(30), "classes": {"x": "many"}},
        {**summary(30), "latency_histogram": {"least_ms": 1, "growth": 1.1, "buckets": {"x": 1}}},
        {**summary(30), "latency_histogram": {"least_ms": 1, "growth": 1.1, "buckets": {"99999": 1}}},
    ],
)
def test_summary_that_cannot_be_read_is_missing(
    server: ReferenceServer, worker: Talker, broken: dict[str, Any]
) -> None:
    batch_id = server.request_batch(images=images(130))
    first, second = shards_of(server, batch_id)
    complete(worker, first, summary(100))
    complete(worker, second, broken)
    batch = server.batch(batch_id)
    assert batch["summary"]["images_ok"] == 100
    assert [each["error"]["code"] for each in batch["summary"]["missing"]] == ["summary_invalid"]
    assert batch["status"] == "completed_with_errors"


def test_cancel_of_a_batch_cancels_its_shards(server: ReferenceServer, worker: Talker) -> None:
    batch_id = server.request_batch(images=images(250))
    first, second, third = shards_of(server, batch_id)
    complete(worker, first, summary(100))
    token = worker.take(second)
    answer = call(server, "DELETE", f"batch/{batch_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelling")
    assert worker.progress(second, token, 1).json() == {"directive": "cancel"}
    assert server.job(third)["status"] == "cancelled"
    worker.finish(second, token, "cancelled")
    batch = server.batch(batch_id)
    assert (batch["status"], batch["summary"]["images_ok"]) == ("cancelled", 100)
    assert [each["job_id"] for each in batch["summary"]["missing"]] == [second, third]
    assert call(server, "DELETE", f"batch/{batch_id}/cancel").status_code == 200
    assert call(server, "DELETE", "batch/none/cancel").status_code == 404


def test_batch_that_is_over_cannot_be_cancelled(server: ReferenceServer, worker: Talker) -> None:
    batch_id = server.request_batch(images=images(2))
    complete(worker, batch_id, summary(2))
    assert call(server, "DELETE", f"batch/{batch_id}/cancel").status_code == 409


def test_shards_that_end_at_once_end_their_batch_once(server: ReferenceServer, worker: Talker) -> None:
    for _ in range(5):
        batch_id = server.request_batch(images=images(800))
        tokens = {job_id: worker.take(job_id) for job_id in shards_of(server, batch_id)}
        with ThreadPoolExecutor(8) as threads:
            answers = [
                threads.submit(Talker(server).finish, job_id, token, "completed", result=summary(100))
                for job_id, token in tokens.items()
            ]
            assert {answer.result().status_code for answer in answers} == {200}
        batch = server.batch(batch_id)
        assert (batch["status"], batch["summary"]["images_ok"]) == ("completed", 800)
        assert len(logs_of(server, batch_id)) == 1


def test_blank_and_broken_lines_stay_where_they_are(
    server: ReferenceServer, worker: Talker, tmp_path: Path
) -> None:
    whole = b"\xef\xbb\xbf" + b"\n" + lines(99) + b"\r\n{broken\n" + b"\n" * 5 + lines(3)[:-1]
    (tmp_path / "list").write_bytes(whole)
    url = server.put_object("datasets", "broken.jsonl", tmp_path / "list")
    batch_id = server.request_batch(manifest_url=url, manifest_sha256=hashlib.sha256(whole).hexdigest())
    batch = server.batch(batch_id)
    # The broken line is an image that the worker will find fault with.
    assert [shard["images"] for shard in batch["shards"]] == [100, 3]
    texts = []
    for shard in batch["shards"]:
        config = server.job(shard["job_id"])["config"]
        texts.append(worker.http.get(server.url + config["manifest_url"], timeout=10).content)
    assert b"".join(texts) == whole
    assert batch["shards"][1]["first_line"] == 1 + texts[0].count(b"\n")
    assert whole.splitlines()[batch["shards"][1]["first_line"] - 1] == texts[1].splitlines()[0]


def test_short_list_in_storage_is_left_there(server: ReferenceServer, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(lines(5))
    url = server.put_object("datasets", "short.jsonl", tmp_path / "list")
    batch_id = server.request_batch(manifest_url=url)
    config = server.job(batch_id)["config"]
    assert (config["manifest_url"], config["manifest_sha256"]) == (url, hashlib.sha256(lines(5)).hexdigest())
    assert server.batch(batch_id)["images_total"] == 5


def test_list_elsewhere_is_left_to_the_worker(server: ReferenceServer, worker: Talker) -> None:
    batch_id = server.request_batch(manifest_url="https://elsewhere/list.jsonl")
    assert server.batch(batch_id)["images_total"] is None
    complete(worker, batch_id, summary(7, 1))
    batch = server.batch(batch_id)
    assert (batch["images_total"], batch["images_done"]) == (8, 8)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "images"),
        ({"images": []}, "images"),
        ({"images": [{"id": 1, "url": "s3://a/b"}], "manifest_url": "s3://a/b"}, "images"),
        ({"images": [{"id": 1, "url": "s3://a/b"}, {"id": 2, "url": "ftp://x"}]}, "images.1.url"),
        ({"images": [{"id": 1}]}, "images.0.url"),
        ({"manifest_url": "s3://datasets/none"}, "manifest_url"),
        ({"manifest_url": "s3://datasets/empty"}, "manifest_url"),
        ({"manifest_url": "s3://datasets/huge"}, "manifest_url"),
        ({"manifest_url": "s3://datasets/many"}, "manifest_url"),
        ({"manifest_url": "s3://datasets/five", "manifest_sha256": "0" * 64}, "manifest_sha256"),
        ({"images": [{"id": 1, "url": "s3://a/b"}], "part_size": 0}, "part_size"),
        ({"images": [{"id": 1, "url": "s3://a/b"}], "confidence_threshold": 1.5}, "confidence_threshold"),
        ({"images": [{"id": 1, "url": "s3://a/b"}], "edge_result": {"detections": []}}, "edge_result"),
        ({"images": [{"id": 1, "url": "s3://a/b"}], "model_version": "none-such"}, "model_version"),
    ],
)
def test_bad_batch_is_refused_and_names_the_field(
    server: ReferenceServer, tmp_path: Path, body: dict[str, Any], field: str
) -> None:
    contents = {"empty": b"\n \r\n", "huge": lines(900) * 5, "many": b"{}\n" * 1001, "five": lines(5)}
    name = str(body.get("manifest_url", "")).rpartition("/")[2]
    if name in contents:
        (tmp_path / name).write_bytes(contents[name])
        server.put_object("datasets", name, tmp_path / name)
    answer = call(server, "POST", "batch-inference", json=body)
    assert answer.status_code == 422, answer.text
    assert [name.partition(".str")[0] for name in answer.json()["errors"]] == [field]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"images": NaN}'])
def test_body_that_is_no_batch(server: ReferenceServer, body: bytes) -> None:
    kind = {**headers(server.admin_token), "Content-Type": "application/json"}
    answer = requests.post(f"{server.url}/api/v1/cv/batch-inference", data=body, headers=kind, timeout=10)
    assert answer.status_code == 422, answer.text


def test_batches_are_listed_newest_first(server: ReferenceServer) -> None:
    batch_ids = [server.request_batch(images=images(2)) for _ in range(2)]
    page = call(server, "GET", "batches?per_page=2").json()
    assert [batch["batch_id"] for batch in page["data"]] == batch_ids[::-1]
    assert call(server, "GET", "batch/none").status_code == 404


def test_batch_queued_by_hand_is_logged_too(server: ReferenceServer, worker: Talker) -> None:
    job_id = server.queue_batch({"images": images(2), "purpose": "reanalysis"})
    complete(worker, job_id, summary(2))
    (log,) = logs_of(server, job_id)
    assert (log["purpose"], log["summary"]["images_ok"]) == ("reanalysis", 2)
