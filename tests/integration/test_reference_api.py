"""The plan's API, tokens, limits, pages and the command line, over HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import stat
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import create_engine

from rvmcv_worker.reference.server import ReferenceServer
from tests.reference_process import CLI
from tests.reference_talker import Talker, headers


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[ReferenceServer]:
    with ReferenceServer(reap=False, database_url=database_url) as running:
        yield running


def call(
    server: ReferenceServer, method: str, path: str, token: str | None = None, **options: Any
) -> requests.Response:
    options.setdefault("headers", headers(server.admin_token if token is None else token))
    return requests.request(method, server.url + path, timeout=20, allow_redirects=False, **options)


def train(server: ReferenceServer, **fields: Any) -> requests.Response:
    body = {"dataset_url": "s3://datasets/x.zip", **fields}
    return call(server, "POST", "/api/v1/cv/train", json=body)


def test_train_queues_what_the_worker_then_gets(server: ReferenceServer) -> None:
    fields = {
        "job_type": "apitest",
        "epochs": -1,
        "img_size": 320,
        "batch_size": 4,
        "base_model": "yolo11n.pt",
    }
    answer = train(server, **fields, options={"patience": 5, "misspelt": True}).json()
    assert (answer["status"], answer["queue_position"]) == ("queued", 1)
    assert train(server, job_type="apitest").json()["queue_position"] == 2
    job = Talker(server, "apitest").poll()[0]
    assert job["job_id"] == answer["job_id"]
    assert job["config"] == {
        "dataset_url": "s3://datasets/x.zip",
        "epochs": -1,
        "img_size": 320,
        "batch_size": 4,
        "base_model": "yolo11n.pt",
        "patience": 5,
        "misspelt": True,
    }


def test_train_fills_in_what_it_knows_of_data_and_model(server: ReferenceServer, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"bytes")
    dataset_id = server.add_dataset(tmp_path / "f", name="set")
    server.add_model(tmp_path / "f", model_name="yolo11", version="yolo11n.pt")
    body = {"dataset_id": dataset_id, "base_model": "yolo11n.pt"}
    job_id = call(server, "POST", "/api/v1/cv/train", json=body).json()["job_id"]
    config = server.job(job_id)["config"]
    assert config["dataset_sha256"] == config["base_model_sha256"]
    assert len(config["dataset_sha256"]) == 64


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "dataset_id"),
        ({"dataset_id": 12345}, "dataset_id"),
        ({"dataset_id": 1, "dataset_url": "s3://a/b"}, "dataset_id"),
        ({"dataset_url": "s3://a/b", "epoch": 3}, "epoch"),
        ({"dataset_url": "s3://a/b", "epochs": "3"}, "epochs"),
        ({"dataset_url": "s3://a/b", "epochs": 3, "options": {"epochs": 4}}, "options.epochs"),
        ({"dataset_url": "s3://a/b", "job_type": "../x"}, "job_type"),
    ],
)
def test_train_refuses_and_names_the_field(server: ReferenceServer, body: dict[str, Any], field: str) -> None:
    answer = call(server, "POST", "/api/v1/cv/train", json=body)
    assert (answer.status_code, list(answer.json()["errors"])) == (422, [field])


def test_job_is_shown_listed_and_cancelled(server: ReferenceServer) -> None:
    job_id = train(server).json()["job_id"]
    assert call(server, "GET", f"/api/v1/cv/job/{job_id}").json()["status"] == "queued"
    listed = call(server, "GET", "/api/v1/cv/training-jobs?per_page=1&page=1").json()
    assert listed["data"][0]["job_id"] == job_id
    assert listed["total"] > 1
    assert call(server, "DELETE", f"/api/v1/cv/job/{job_id}/cancel").json()["status"] == "cancelled"
    queued = call(server, "GET", "/api/v1/cv/training-jobs?status=cancelled").json()["data"]
    assert job_id in [job["job_id"] for job in queued]
    assert call(server, "GET", "/api/v1/cv/job/none").status_code == 404
    assert call(server, "DELETE", "/api/v1/cv/job/none/cancel").status_code == 404


def test_cancel_of_a_finished_job_is_a_conflict(server: ReferenceServer) -> None:
    worker = Talker(server)
    job_id = worker.queue()
    worker.finish(job_id, worker.take(job_id), "completed", result={})
    assert call(server, "DELETE", f"/api/v1/cv/job/{job_id}/cancel").status_code == 409


def test_health_and_metrics(server: ReferenceServer) -> None:
    worker = Talker(server)
    worker.queue()
    worker.status()
    health = call(server, "GET", "/api/v1/cv/health", server.edge_token).json()
    assert health["status"] == "healthy"
    assert worker.worker_id in health["workers_seen_s_ago"]
    metrics = call(server, "GET", "/api/v1/cv/metrics").json()
    assert metrics["jobs"][worker.job_type] == {"queued": 1}
    assert "lease_token" not in json.dumps(metrics)


def test_request_without_token(server: ReferenceServer) -> None:
    path = "/api/v1/cv/training-jobs"
    answer = call(server, "GET", path, headers={"Accept": "application/json"})
    assert (answer.status_code, answer.json()) == (401, {"message": "Unauthenticated."})
    answer = call(server, "GET", path, headers={"Accept": "text/html"})
    assert (answer.status_code, answer.headers["Location"]) == (302, "/login")
    assert call(server, "GET", path, "rvm_wrong").status_code == 401


def test_each_token_may_do_its_own(server: ReferenceServer) -> None:
    tokens = {"worker": server.worker_token, "admin": server.admin_token, "edge": server.edge_token}
    calls = {
        ("GET", "/api/v1/cv/training-jobs"): {"admin"},
        ("POST", "/api/v1/cv/train"): {"admin"},
        ("POST", "/api/v1/cv/models/999999/activate"): {"admin"},
        ("POST", "/api/v1/cv/tokens"): {"admin"},
        ("GET", "/api/v1/cv/job-status"): {"worker"},
        ("POST", "/api/v1/cv/job-status"): {"worker"},
        ("POST", "/api/v1/cv/worker-status"): {"worker"},
        ("POST", "/api/v1/cv/job-uploads"): {"worker"},
        ("GET", "/api/v1/cv/download-model/none"): {"worker", "admin"},
        ("GET", "/api/v1/cv/datasets/999"): {"worker", "admin"},
        ("POST", "/api/v1/cv/upload-model"): {"worker", "admin"},
        ("GET", "/api/v1/edge/model-sync"): {"edge"},
        ("GET", "/api/v1/edge/download-model/none"): {"edge"},
        ("GET", "/api/v1/cv/health"): {"worker", "admin", "edge"},
    }
    for (method, path), allowed in calls.items():
        body = {"json": {}} if method == "POST" else {}
        admitted = {
            name
            for name, token in tokens.items()
            if call(server, method, path, token, **body).status_code != 403
        }
        assert admitted == allowed, path


def test_token_is_made_and_revoked(server: ReferenceServer) -> None:
    body = {"name": "vm102", "abilities": ["worker"]}
    token = call(server, "POST", "/api/v1/cv/tokens", json=body).json()["token"]
    poll = "/api/v1/cv/worker-status"
    assert call(server, "POST", poll, token, json={}).status_code == 422
    assert call(server, "DELETE", "/api/v1/cv/tokens/vm102").json() == {"revoked": 1}
    assert call(server, "POST", poll, token, json={}).status_code == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"event": "progress", "losses": NaN}', 422),
        (b'{"event": "dance"}', 422),
        (b"[]", 422),
        (b"", 422),
        (b'{"pad": "' + b"x" * (512 * 1024) + b'"}', 413),
    ],
)
def test_bodies_that_are_no_reports(server: ReferenceServer, body: bytes, status: int) -> None:
    kind = {"Content-Type": "application/json"}
    answer = call(
        server, "POST", "/api/v1/cv/job-status", data=body, headers={**headers(server.worker_token), **kind}
    )
    assert answer.status_code == status
    assert "message" in answer.json()


def test_wrong_content_type_is_415(server: ReferenceServer) -> None:
    kind = {"Content-Type": "text/plain"}
    answer = call(
        server, "POST", "/api/v1/cv/job-status", data="{}", headers={**headers(server.worker_token), **kind}
    )
    assert answer.status_code == 415


def test_chunked_body_over_its_limit_is_cut_off(server: ReferenceServer) -> None:
    kind = {"Content-Type": "application/json"}
    answer = call(
        server,
        "POST",
        "/api/v1/cv/job-status",
        data=(b"x" * 65536 for _ in range(20)),
        headers={**headers(server.worker_token), **kind},
    )
    assert answer.status_code == 413


def test_edge_gets_the_active_detector_and_nothing_else(server: ReferenceServer, tmp_path: Path) -> None:
    ids = {}
    for name, version in (("yolo11", "one"), ("yolo11", "two"), ("sam2", "three"), ("yolo11", "four")):
        (tmp_path / version).write_bytes(version.encode())
        ids[version] = server.add_model(tmp_path / version, model_name=name, version=version)
    sync = "/api/v1/edge/model-sync"
    assert call(server, "GET", sync, server.edge_token).status_code == 404
    for version in ("one", "two", "three"):
        call(server, "POST", f"/api/v1/cv/models/{ids[version]}/activate")
    data = call(server, "GET", sync, server.edge_token).json()["data"]
    assert (data["version"], data["update_available"]) == ("two", True)
    got = call(server, "GET", data["download_url"], server.edge_token)
    assert (got.content, got.headers["X-SHA256-Hash"]) == (b"two", data["sha256_hash"])
    again = call(server, "GET", f"{sync}?current_hash={data['sha256_hash']}", server.edge_token)
    assert again.json()["data"]["update_available"] is False
    never = next(model["sha256_hash"] for model in server.models() if model["version"] == "four")
    assert call(server, "GET", f"/api/v1/edge/download-model/{never}", server.edge_token).status_code == 404
    # Back to the one before.
    call(server, "POST", f"/api/v1/cv/models/{ids['one']}/activate")
    assert call(server, "GET", sync, server.edge_token).json()["data"]["version"] == "one"


def test_job_page_shows_the_error_and_runs_nothing(server: ReferenceServer) -> None:
    worker = Talker(server)
    job_id = worker.queue({"note": "<img src=x>"}, job_id="../x<script>")
    token = worker.take(job_id)
    worker.progress(job_id, token, 1, fraction=0.5, phase="train")
    error = {"code": "dataset_invalid", "message": "<script>alert(1)</script> labels/a.txt:3"}
    worker.finish(job_id, token, "failed", error=error)
    login = {"auth": ("any", server.admin_token), "headers": {}}
    page = call(server, "GET", "/job", params={"job_id": job_id}, **login)
    assert page.status_code == 200
    assert "&lt;script&gt;alert(1)&lt;/script&gt; labels/a.txt:3" in page.text
    assert "dataset_invalid" in page.text
    assert "<script" not in page.text
    assert "<img" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    jobs = call(server, "GET", "/jobs", **login)
    assert "job_id=../x%3Cscript%3E" in jobs.text
    assert call(server, "GET", "/job?job_id=none", **login).status_code == 404


def test_job_page_says_why_no_worker_gets_the_job(server: ReferenceServer) -> None:
    job_id = Talker(server).queue({"gpus": 60})
    login = {"auth": ("any", server.admin_token), "headers": {}}
    page, other = (
        call(server, "GET", "/job", params={"job_id": queued}, **login).text
        for queued in (job_id, Talker(server).queue())
    )
    assert "Waits: it asks for 60 GPUs of one worker, and no worker has 60" in page
    assert "Waits:" not in other


def test_jobs_page_warns_of_two_daemons_of_one_name(server: ReferenceServer) -> None:
    login = {"auth": ("any", server.admin_token), "headers": {}}
    worker = Talker(server)
    first, second = worker.instance_id, str(uuid.uuid4())
    for instance in (first, second, first, second, first):
        worker.instance_id = instance
        worker.status()
    warning = f"Two daemons run as worker {worker.worker_id}"
    assert warning not in call(server, "GET", "/jobs", **login).text
    worker.status()
    assert warning in call(server, "GET", "/jobs", **login).text


@pytest.mark.parametrize("auth", [None, ("any", "wrong"), ("any", "worker")])
def test_pages_need_an_admin_token(server: ReferenceServer, auth: tuple[str, str] | None) -> None:
    if auth == ("any", "worker"):
        auth = ("any", server.worker_token)
    answer = call(server, "GET", "/jobs", headers={}, auth=auth)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic")


def test_openapi_document_describes_every_call(server: ReferenceServer) -> None:
    document = requests.get(server.url + "/openapi.json", timeout=10).json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (method, path)
            assert operation["security"] == [{"HTTPBearer": []}], (method, path)
    assert "Finish" in document["components"]["schemas"]
    assert document["paths"].keys() >= {
        f"/api/v1/cv/{path}" for path in ("inference", "batch-inference", "playground-inference", "alerts")
    }


def test_openapi_document_refers_to_nothing_that_it_does_not_have(server: ReferenceServer) -> None:
    text = requests.get(server.url + "/openapi.json", timeout=10).text
    document = json.loads(text)
    for reference in set(re.findall(r'"\$ref": ?"([^"]*)"', text)):
        assert reference.startswith("#/components/schemas/")
        assert reference.rpartition("/")[2] in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method in ("post", "put") and not path.endswith(("activate", "acknowledge")):
                assert operation["requestBody"]["content"], (method, path)


@contextlib.contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_command_line_from_serve_to_roll_back(tmp_path: Path) -> None:
    data, ready = tmp_path / "data", tmp_path / "ready.json"
    (tmp_path / "set.zip").write_bytes(b"zip")
    (tmp_path / "yolo11n.pt").write_bytes(b"weights")
    here = ["--data-dir", str(data)]
    serve = [*CLI, "serve", "--port", "0", *here, "--ready-file", str(ready)]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as process, killed_at_the_end(process):
        assert process.stdout is not None
        assert "RVM-Server (reference)" in process.stdout.readline()
        state = json.loads(ready.read_text())
        assert (
            stat.S_IMODE(ready.stat().st_mode) == stat.S_IMODE((data / "state.json").stat().st_mode) == 0o600
        )
        token = run_cli("token", "--ability", "worker", "--name", "vm102", *here).stdout.strip()
        assert requests.get(state["url"] + "/api/v1/cv/health", headers=headers(token), timeout=10).ok
        queued = run_cli("train", str(tmp_path / "set.zip"), "--epochs", "2", "--option", "seed=7", *here)
        job_id = queued.stdout.strip()
        assert job_id in run_cli("jobs", *here).stdout
        assert run_cli("cancel", job_id, *here).stdout.strip() == "cancelled"
        unknown = run_cli("cancel", "nothing", *here)
        assert (unknown.returncode, "Job not found" in unknown.stderr) == (1, True)
        model = run_cli("add-model", str(tmp_path / "yolo11n.pt"), *here).stdout.strip()
        assert "yolo11n.pt is active" in run_cli("activate", model, *here).stdout
        assert "active" in run_cli("models", *here).stdout
        (tmp_path / "image.jpg").write_bytes(b"image")
        (tmp_path / "list.jsonl").write_bytes(b'{"id": 1, "url": "s3://datasets/x.jpg"}\n')
        tried = run_cli("infer", str(tmp_path / "image.jpg"), "--wait-s", "0", *here)
        assert json.loads(tried.stdout)["status"] == "queued"
        again = run_cli("result", json.loads(tried.stdout)["job_id"], *here)
        assert (again.returncode, json.loads(again.stdout)) == (0, json.loads(tried.stdout))
        batch_id = run_cli("batch", str(tmp_path / "list.jsonl"), *here).stdout.strip()
        assert run_cli("cancel", batch_id, *here).stdout.strip() == "cancelled"
        over = run_cli("result", batch_id, *here)
        assert (over.returncode, json.loads(over.stdout)["status"]) == (1, "cancelled")
        refused = run_cli("infer", "s3://datasets/x.jpg", "--option", "confidence_threshold=2", *here)
        assert (refused.returncode, "confidence_threshold" in refused.stderr) == (1, True)
        assert "Alert not found" in run_cli("acknowledge", "1", *here).stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    for arguments, message in (
        (["jobs", "--data-dir", str(tmp_path)], "serve"),
        (["jobs", "--url", "http://127.0.0.1:1"], "--token-file"),
        (["serve", "--gates", "moat", "--data-dir", str(tmp_path)], "the gates are"),
    ):
        done = run_cli(*arguments)
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_database_of_an_older_version_is_brought_up_to_date(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    database_url = f"sqlite:///{tmp_path / 'old.db'}"
    if kind == "postgresql":
        database_url = request.getfixturevalue("postgres").new_database()
    dropped = {
        "cv_inference_jobs": ("batch_id", "shard", "asked_by"),
        "cv_inference_logs": ("comparison", "summary"),
        "cv_workers": ("silence_told",),
    }
    with ReferenceServer(reap=False, database_url=database_url) as server:
        old = server.queue_inference({"image_url": "s3://a/b"})
    engine = create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"))

    def change(*statements: str) -> None:
        with engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    drop_index = "DROP INDEX ix_cv_inference_jobs_batch_id"
    change(drop_index, "DROP TABLE cv_alerts")
    change(*(f"ALTER TABLE {table} DROP COLUMN {name}" for table, names in dropped.items() for name in names))
    (tmp_path / "m").write_bytes(b"m")
    with ReferenceServer(reap=False, database_url=database_url) as server:
        version = uuid.uuid4().hex[:8]
        server.add_model(tmp_path / "m", model_name="yolo11", version=version)
        new = server.request_inference(image_url="s3://a/b", model_version=version)
        worker = Talker(server, "inference")
        for job_id in (old, new):
            answer = worker.finish(job_id, worker.take(job_id), "completed", result={"detections": []})
            assert answer.status_code == 200
        assert [log["job_id"] for log in server.inference_logs()] == [old, new]
    # It is there again.
    change(drop_index)
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql:///x?host=/nowhere", "cannot use the database: .*/nowhere"),
        ("sqlite:////nowhere/x.db", "cannot use the database: unable to open"),
        ("nonsense", "not a database's URL"),
        ("nosuch://here/x", "not a database's URL"),
    ],
)
def test_server_without_its_database_says_so(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(OSError, match=message):
        ReferenceServer(tmp_path, database_url=url).start()


def test_lease_key_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        ReferenceServer(tmp_path, lease_key="short")
