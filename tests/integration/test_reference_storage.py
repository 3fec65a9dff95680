"""Data sets, models and objects: uploads, downloads, today's faults and gates."""

from __future__ import annotations

import hashlib
import io
import json
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Gate, Settings
from tests.reference_talker import Talker, headers


@pytest.fixture(scope="module")
def server() -> Iterator[ReferenceServer]:
    with ReferenceServer(reap=False, settings=Settings(auto_activate=True)) as running:
        yield running


@pytest.fixture
def worker(server: ReferenceServer) -> Talker:
    return Talker(server)


@pytest.fixture(scope="module")
def today() -> Iterator[ReferenceServer]:
    with ReferenceServer(reap=False, settings=Settings(as_today=True)) as running:
        yield running


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def unique(start: bytes = b"model ") -> bytes:
    return start + uuid.uuid4().bytes


def running_job(worker: Talker) -> tuple[str, int, str]:
    """Return id, row and lease token of a job that the worker holds."""
    job_id = worker.queue()
    return job_id, worker.server.job(job_id)["id"], worker.take(job_id)


def upload(worker: Talker, data: bytes, **fields: Any) -> requests.Response:
    form = {"model_name": "yolo11", **fields}
    files = {"model_file": ("best.pt", io.BytesIO(data))}
    return worker.http.post(worker.url("upload-model"), data=form, files=files, timeout=30)


def download(worker: Talker, name: str, **options: Any) -> requests.Response:
    return worker.http.get(worker.url(f"download-model/{name}"), timeout=30, **options)


def test_model_is_inert_until_a_completed_finish_names_it(worker: Talker, server: ReferenceServer) -> None:
    data, version = unique(), f"v{uuid.uuid4().hex[:8]}-a1"
    job_id, row, token = running_job(worker)
    fields = {"version": version, "training_job_id": row, "lease_token": token}
    answer = upload(worker, data, metrics=json.dumps({"mAP50": 0.9}), **fields)
    assert answer.status_code == 201, answer.text
    stored = answer.json()["data"]
    assert stored["sha256_hash"] == sha256(data)
    assert f"/{job_id}/attempt-1/" in stored["file_path"]
    assert upload(worker, data, **fields).json()["data"]["model_id"] == stored["model_id"]

    assert download(worker, version).status_code == 404
    assert download(worker, sha256(data)).content == data
    activate = f"{server.url}/api/v1/cv/models/{stored['model_id']}/activate"
    assert requests.post(activate, headers=headers(server.admin_token), timeout=10).status_code == 409

    result = {"sha256_hash": sha256(data), "model_name": "yolo11", "version": version}
    assert worker.finish(job_id, token, "completed", result=result).status_code == 200
    found = download(worker, version)
    assert (found.content, found.headers["X-SHA256-Hash"]) == (data, sha256(data))
    assert requests.post(activate, headers=headers(server.admin_token), timeout=10).status_code == 200
    (model,) = [each for each in server.models() if each["is_active"] and each["model_name"] == "yolo11"]
    assert model["id"] == stored["model_id"]


def test_download_resumes_by_range(worker: Talker, server: ReferenceServer, tmp_path: Path) -> None:
    data = unique(b"x" * 1000)
    (tmp_path / "m.pt").write_bytes(data)
    server.add_model(tmp_path / "m.pt", model_name="yolo11", version="range.pt")
    rest = download(worker, "range.pt", headers={"Range": "bytes=990-"})
    assert (rest.status_code, rest.content) == (206, data[990:])
    assert rest.headers["Content-Range"] == f"bytes 990-{len(data) - 1}/{len(data)}"
    assert download(worker, "range.pt", headers={"Range": "bytes=5000-"}).status_code == 416


def test_upload_of_other_bytes_under_a_version_is_refused(worker: Talker) -> None:
    _job, row, token = running_job(worker)
    fields = {"version": f"v{uuid.uuid4().hex[:8]}-a1", "training_job_id": row, "lease_token": token}
    assert upload(worker, unique(), **fields).status_code == 201
    other = upload(worker, unique(), **fields)
    assert other.status_code == 422
    assert "version" in other.json()["errors"]


def test_upload_needs_the_lease_and_the_attempts_version(worker: Talker, server: ReferenceServer) -> None:
    _job, row, token = running_job(worker)
    fenced = upload(worker, b"m", version="v-a1", training_job_id=row, lease_token="f" * 64)
    assert (fenced.status_code, fenced.json()["reason"]) == (409, "taken")
    unknown = upload(worker, b"m", version="v-a1", training_job_id=999_999, lease_token=token)
    assert (unknown.status_code, unknown.json()["reason"]) == (404, "unknown_job")
    for wrong in (
        {"version": "v-a2", "training_job_id": row, "lease_token": token},
        {"version": "../x-a1", "training_job_id": row, "lease_token": token},
        {"version": "v-a1", "training_job_id": row},
        {"version": "v-a1"},
        {"version": "v-a1", "training_job_id": row, "lease_token": token, "extra": "1"},
        {"version": "v-a1", "training_job_id": "x", "lease_token": token},
        {"version": "v-a1", "training_job_id": row, "lease_token": token, "metrics": "{"},
    ):
        assert upload(worker, b"m", **wrong).status_code == 422, wrong
    assert not [model for model in server.models() if model["training_job_id"] == row]


def test_object_in_storage_becomes_a_model_when_its_hash_is_right(
    worker: Talker, server: ReferenceServer, tmp_path: Path
) -> None:
    data = unique()
    (tmp_path / "best.pt").write_bytes(data)
    job_id, row, token = running_job(worker)
    path = server.put_object("artifacts", f"{job_id}/attempt-1/best.pt", tmp_path / "best.pt")
    body = {
        "model_name": "yolo11",
        "version": f"v{uuid.uuid4().hex[:8]}-a1",
        "training_job_id": row,
        "lease_token": token,
        "metrics": {"mAP50": 0.5},
        "file_path": path,
    }
    wrong = worker.post("upload-model", {**body, "sha256_hash": "0" * 64})
    assert (wrong.status_code, list(wrong.json()["errors"])) == (422, ["sha256_hash"])
    missing = worker.post("upload-model", {**body, "file_path": path + "x", "sha256_hash": sha256(data)})
    assert (missing.status_code, list(missing.json()["errors"])) == (422, ["file_path"])
    elsewhere = worker.post(
        "upload-model", {**body, "file_path": "s3://models/x.pt", "sha256_hash": "0" * 64}
    )
    assert elsewhere.status_code == 422
    right = worker.post("upload-model", {**body, "sha256_hash": sha256(data)})
    assert right.status_code == 201, right.text
    assert download(worker, sha256(data)).content == data


def test_finish_may_name_an_object_but_not_a_model_that_is_nowhere(
    worker: Talker, server: ReferenceServer, tmp_path: Path
) -> None:
    data, version = unique(), f"v{uuid.uuid4().hex[:8]}-a1"
    (tmp_path / "best.pt").write_bytes(data)
    job_id, _row, token = running_job(worker)
    result = {"model_name": "yolo11", "version": version, "sha256_hash": sha256(data), "metrics": {}}
    nowhere = worker.finish(job_id, token, "completed", result=result)
    assert nowhere.status_code == 422
    assert "was not uploaded" in nowhere.json()["message"]
    assert server.job(job_id)["status"] == "processing"
    result["result_model_path"] = server.put_object(
        "artifacts", f"{job_id}/attempt-1/best.pt", tmp_path / "best.pt"
    )
    assert worker.finish(job_id, token, "completed", result=result).status_code == 200
    assert download(worker, version).content == data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"leaks": 3}, "leaks"),
        ({"leaks": None}, "leaks"),
        ({"fitness": 0.5}, "fitness"),
        ({"fitness": None}, "fitness"),
        ({"classes": ["can"]}, "classes"),
        ({"active": None}, "was not measured"),
    ],
)
def test_automatic_activation_needs_proof(
    worker: Talker, server: ReferenceServer, tmp_path: Path, change: dict[str, Any], reason: str | None
) -> None:
    old = unique()
    (tmp_path / "old.pt").write_bytes(old)
    server.add_model(
        tmp_path / "old.pt", model_name="yolo11", version=f"o{uuid.uuid4().hex[:8]}", active=True
    )
    same = {"task": "detect", "classes": ["bottle", "can"]}
    metrics = {**same, "leaks": 0, "fitness": 0.8, "active": {**same, "sha256": sha256(old), "fitness": 0.5}}
    data, version = unique(), f"v{uuid.uuid4().hex[:8]}-a1"
    job_id, row, token = running_job(worker)
    upload(worker, data, version=version, training_job_id=row, lease_token=token)
    result = {"sha256_hash": sha256(data), "metrics": {**metrics, **change}}
    worker.finish(job_id, token, "completed", result=result)
    activation = server.job(job_id)["activation"]
    assert activation["activated"] is (reason is None)
    assert (reason or "measured better") in activation["reason"]
    (active,) = [model for model in server.models() if model["is_active"]]
    assert active["sha256_hash"] == (sha256(data) if reason is None else sha256(old))


def test_job_uploads_are_presigned_under_the_attempts_keys(worker: Talker, server: ReferenceServer) -> None:
    job_id, _row, token = running_job(worker)
    files = [{"name": "results.csv", "size": 3, "sha256": sha256(b"abc")}]
    answer = worker.post("job-uploads", {"job_id": job_id, "lease_token": token, "files": files})
    upload = answer.json()["uploads"]["results.csv"]
    assert upload["path"] == f"s3://artifacts/{job_id}/attempt-1/results.csv"
    assert requests.put(upload["url"], data=b"abc", timeout=10).status_code == 200
    assert server.read_object(upload["path"]) == b"abc"
    for name in ("../x", "a/b", "", ".hidden"):
        body = {"job_id": job_id, "lease_token": token, "files": [{**files[0], "name": name}]}
        assert worker.post("job-uploads", body).status_code == 422
    fenced = worker.post("job-uploads", {"job_id": job_id, "lease_token": "no", "files": files})
    assert fenced.status_code == 409


def test_dataset_is_shown_and_sent(worker: Talker, server: ReferenceServer, tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"zip bytes")
    dataset_id = server.add_dataset(tmp_path / "set.zip", name="bottles")
    data = worker.http.get(worker.url(f"datasets/{dataset_id}"), timeout=10).json()["data"]
    assert (data["name"], data["sha256"], data["size_bytes"]) == ("bottles", sha256(b"zip bytes"), 9)
    sent = worker.http.get(server.url + data["download_url"], timeout=10)
    assert sent.content == b"zip bytes"
    assert worker.http.get(worker.url("datasets/999"), timeout=10).status_code == 404


def test_training_complete_is_a_courtesy(worker: Talker) -> None:
    job_id, row, _token = running_job(worker)
    body = {"training_job_id": row, "status": "success", "metrics": "{}"}
    assert worker.post("training-complete", body).status_code == 200
    assert worker.server.job(job_id)["status"] == "processing"
    assert worker.post("training-complete", {**body, "training_job_id": 10**6}).status_code == 404


def test_downloads_can_be_redirected(tmp_path: Path) -> None:
    with ReferenceServer(reap=False, settings=Settings(redirect_downloads=True)) as server:
        (tmp_path / "m.pt").write_bytes(b"elsewhere")
        server.add_model(tmp_path / "m.pt", model_name="yolo11", version="m.pt")
        answer = download(Talker(server), "m.pt", allow_redirects=False)
        assert answer.status_code == 302
        assert answer.headers["Location"].startswith(server.s3_endpoint)
        assert requests.get(answer.headers["Location"], timeout=10).content == b"elsewhere"


def test_objects_and_jobs_outlive_a_restart(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"bytes")
    with ReferenceServer(tmp_path / "data", reap=False) as server:
        server.add_model(tmp_path / "m.pt", model_name="yolo11", version="m.pt")
        worker = Talker(server)
        job_id = worker.queue()
        token = worker.take(job_id)
    with ReferenceServer(tmp_path / "data", reap=False) as again:
        worker.server = again
        assert again.worker_token == server.worker_token
        assert download(worker, "m.pt").content == b"bytes"
        assert worker.finish(job_id, token, "completed", result={}).status_code == 200


def test_today_repeated_upload_overwrites_and_answers_500(today: ReferenceServer) -> None:
    worker = Talker(today)
    first, second = unique(), unique()
    assert upload(worker, first, version="v1-a1", lease_token="ignored").status_code == 201
    assert upload(worker, second, version="v1-a1").status_code == 500
    under_old_hash = download(worker, sha256(first))
    assert under_old_hash.headers["X-SHA256-Hash"] == sha256(first)
    assert under_old_hash.content == second


def test_today_training_complete_answers_500(today: ReferenceServer) -> None:
    answer = Talker(today).post("training-complete", {"training_job_id": 1, "status": "success"})
    assert answer.status_code == 500


def test_today_finish_completes_a_training(today: ReferenceServer) -> None:
    worker, data = Talker(today), unique()
    job_id, row, token = running_job(worker)
    assert upload(worker, data, version="v2-a1", training_job_id=row).status_code == 201
    result = {"sha256_hash": sha256(data), "metrics": {}}
    assert worker.finish(job_id, token, "completed", result=result).status_code == 200
    assert today.job(job_id)["activation"]["activated"] is False


def a_checkpoint(size_bytes: int) -> bytes:
    """Return a zip, as torch.save writes one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(size_bytes))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("gate", "size_bytes", "status", "text"),
    [
        (Gate.NGINX, 2**20, 413, "413 Request Entity Too Large"),
        (Gate.NGINX, 1000, 201, "success"),
        (Gate.PHP, 9 * 2**20, 413, "POST data is too large"),
        (Gate.PHP, 3 * 2**20, 422, "failed to upload"),
        (Gate.MIMES, 1000, 422, "must be a file of type: pt, onnx"),
    ],
)
def test_gates_stop_a_checkpoint(gate: Gate, size_bytes: int, status: int, text: str) -> None:
    with ReferenceServer(reap=False, settings=Settings(as_today=True, gates=frozenset({gate}))) as server:
        answer = upload(Talker(server), a_checkpoint(size_bytes), version="v1-a1")
        assert (answer.status_code, text in answer.text) == (status, True), answer.text
        assert ("html" in answer.headers["Content-Type"]) is (gate is Gate.NGINX and status == 413)


def test_active_model_is_the_active_detector(tmp_path: Path) -> None:
    detector, segmenter = tmp_path / "detector", tmp_path / "segmenter"
    detector.write_bytes(b"detector")
    segmenter.write_bytes(b"segmenter")
    with ReferenceServer(reap=False) as server:
        worker = Talker(server)
        assert download(worker, "active").status_code == 404
        server.add_model(detector, model_name="yolo11", version="v1", active=True)
        server.add_model(segmenter, model_name="sam2", version="s1", active=True)
        got = download(worker, "active")
        assert (got.content, got.headers["X-SHA256-Hash"]) == (b"detector", sha256(b"detector"))
        form = {"model_name": "yolo11", "version": "active"}
        taken = requests.post(
            worker.url("upload-model"),
            data=form,
            files={"model_file": b"x"},
            headers=headers(server.admin_token),
            timeout=10,
        )
        assert (taken.status_code, list(taken.json()["errors"])) == (422, ["version"])
