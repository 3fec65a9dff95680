"""Single inferences: asked for over HTTP, done by a talker, waited for, logged."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings
from tests.reference_talker import Talker, headers

IMAGE = "s3://datasets/bottle.jpg"
DETECTION = {"class": "PET_bottle", "confidence": 0.92, "bbox": [1.0, 2.0, 3.0, 4.0]}
RESULT = {
    "detections": [{**DETECTION, "segmentation": "iVBORw0KGgo="}],
    "processing_time_ms": 152,
    "model_used": "yolo11_v3.pt",
    "model_sha256": "0" * 64,
}


@pytest.fixture(scope="module")
def server(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceServer]:
    folder = tmp_path_factory.mktemp("models")
    with ReferenceServer(
        reap=False, database_url=database_url, settings=Settings(held_answers_limit=3)
    ) as made:
        for name, version, active in (
            ("yolo11", "v2", True),
            ("yolo11", "v3", True),
            ("yolo11", "candidate", False),
            ("sam2", "sam2.1_hiera_tiny.pt", False),
            ("sam2", "fine", True),
        ):
            (folder / version).write_bytes(version.encode())
            made.add_model(folder / version, model_name=name, version=version, active=active)
        yield made


@pytest.fixture
def worker(server: ReferenceServer) -> Talker:
    return Talker(server, "inference")


def sha256(version: str) -> str:
    return hashlib.sha256(version.encode()).hexdigest()


def call(
    server: ReferenceServer, method: str, path: str, token: str | None = None, **options: Any
) -> requests.Response:
    return requests.request(
        method,
        f"{server.url}/api/v1/cv/{path}",
        headers=headers(server.edge_token if token is None else token),
        timeout=40,
        **options,
    )


def ask(server: ReferenceServer, query: str = "", **fields: Any) -> requests.Response:
    return call(server, "POST", f"inference{query}", json={"image_url": IMAGE, **fields})


def config_of(server: ReferenceServer, **fields: Any) -> dict[str, Any]:
    answer = ask(server, **fields)
    assert answer.status_code == 202, answer.text
    config: dict[str, Any] = server.job(answer.json()["job_id"])["config"]
    return config


def logs_of(server: ReferenceServer, job_id: str) -> list[dict[str, Any]]:
    return [log for log in server.inference_logs() if log["job_id"] == job_id]


def test_worker_gets_what_was_asked_with_the_model_filled_in(server: ReferenceServer, worker: Talker) -> None:
    seen = {"detections": [DETECTION], "model_version": "v2", "image_size": [640, 480]}
    fields = {
        "confidence_threshold": 0.75,
        "img_size": 320,
        "purpose": "fraud_check",
        "edge_result": seen,
        "callback_url": "https://rvm/x",
    }
    job_id = ask(server, **fields).json()["job_id"]
    offered = {job["job_id"]: job["config"] for job in worker.poll(lane="infer", slots=100)}
    assert offered[job_id] == {
        "image_url": IMAGE,
        **fields,
        "segmentation": False,
        "annotated": False,
        "model_version": "v3",
        "model_sha256": sha256("v3"),
        "model_active": True,
    }


@pytest.mark.parametrize(
    ("name", "version", "active"),
    [
        ("v3", "v3", True),
        ("v3.pt", "v3", True),
        ("yolo11_v3.pt", "v3", True),
        ("active", "v3", True),
        # Active once, and not any more: a roll-back took the trust away.
        ("v2", "v2", False),
        ("candidate", "candidate", False),
    ],
)
def test_model_is_found_by_any_of_its_names(
    server: ReferenceServer, name: str, version: str, active: bool
) -> None:
    config = config_of(server, model_version=name)
    assert (config["model_sha256"], config["model_active"]) == (sha256(version), active)
    assert config["model_version"] == ("v3" if name == "active" else name)
    by_hash = config_of(server, model_version=sha256(version))
    assert (by_hash["model_version"], by_hash["model_sha256"]) == (version, sha256(version))


@pytest.mark.parametrize(
    ("asked", "filled_in"),
    [
        ({}, {"segmenter": "fine", "segmenter_sha256": sha256("fine"), "segmenter_active": True}),
        ({"segmenter": "yolo"}, {"segmenter": "yolo"}),
        (
            {"segmenter": "sam2.1_hiera_tiny"},
            {
                "segmenter": "sam2.1_hiera_tiny",
                "segmenter_sha256": sha256("sam2.1_hiera_tiny.pt"),
                "segmenter_active": False,
            },
        ),
    ],
)
def test_segmenter_is_filled_in(
    server: ReferenceServer, asked: dict[str, Any], filled_in: dict[str, Any]
) -> None:
    config = config_of(server, segmentation=True, **asked)
    assert {key: value for key, value in config.items() if key.startswith("segmenter")} == filled_in


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"image_url": None}, "image_url"),
        ({"image_url": "file:///etc/passwd"}, "image_url"),
        ({"image_sha256": "abc"}, "image_sha256"),
        ({"confidence_threshold": 1.5}, "confidence_threshold"),
        ({"confidence_threshold": "0.5"}, "confidence_threshold"),
        ({"iou_threshold": -0.1}, "iou_threshold"),
        ({"img_size": 100}, "img_size"),
        ({"img_size": 4096}, "img_size"),
        ({"max_detections": 0}, "max_detections"),
        ({"mask_format": "bmp"}, "mask_format"),
        ({"purpose": "fun"}, "purpose"),
        ({"confidence": 0.5}, "confidence"),
        (
            {"edge_result": {"detections": [{"class": "x", "confidence": 2}]}},
            "edge_result.detections.0.confidence",
        ),
        ({"edge_result": {"detections": [{**DETECTION, "class": "a\nb"}]}}, "edge_result.detections.0.class"),
        (
            {"edge_result": {"detections": [{**DETECTION, "bbox": [9, 0, 1, 4]}]}},
            "edge_result.detections.0.bbox",
        ),
        ({"edge_result": {"detections": [], "image_size": [0, 480]}}, "edge_result.image_size.0"),
        ({"request_id": "short"}, "request_id"),
        ({"model_version": "none-such"}, "model_version"),
        ({"model_version": "fine"}, "model_version"),
        ({"model_version": "../x"}, "model_version"),
        ({"segmentation": True, "segmenter": "none-such"}, "segmenter"),
        ({"segmentation": True, "segmenter": "v3"}, "segmenter"),
        ({"segmenter": "fine"}, "segmenter"),
    ],
)
def test_bad_request_is_refused_and_names_the_field(
    server: ReferenceServer, fields: dict[str, Any], field: str
) -> None:
    answer = ask(server, **fields)
    assert (answer.status_code, list(answer.json()["errors"])) == (422, [field]), answer.text


def test_request_with_nan_is_refused(server: ReferenceServer) -> None:
    kind = {**headers(server.edge_token), "Content-Type": "application/json"}
    body = b'{"image_url": "s3://a/b", "confidence_threshold": NaN}'
    url = f"{server.url}/api/v1/cv/inference"
    assert requests.post(url, data=body, headers=kind, timeout=10).status_code == 422


def test_without_an_active_model_one_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"m")
    with ReferenceServer(reap=False) as server:
        server.add_model(tmp_path / "m", model_name="yolo11", version="v1")
        refused = ask(server)
        assert (refused.status_code, list(refused.json()["errors"])) == (422, ["model_version"])
        assert "no yolo11 is active" in refused.json()["message"]
        assert ask(server, model_version="v1").status_code == 202


def test_the_less_sure_the_machine_the_sooner(server: ReferenceServer) -> None:
    def priority(**fields: Any) -> int:
        return int(ask(server, **fields).json()["priority"])

    def seen(*confidences: float) -> dict[str, Any]:
        return {"detections": [{"class": "x", "confidence": each} for each in confidences]}

    assert priority(purpose="fraud_check") == 10
    assert priority(purpose="fraud_check", edge_result=seen(1.0)) == 10
    assert priority(purpose="fraud_check", edge_result=seen(0.95, 0.3)) == 17
    assert priority(edge_result=seen()) == 20
    rest = [
        priority(purpose=each, edge_result=seen(0)) for each in ("playground", "reanalysis", "batch_analysis")
    ]
    assert rest == [5, 2, 0]


def test_result_comes_within_the_wait(server: ReferenceServer, worker: Talker) -> None:
    mark = uuid.uuid4().hex
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, server, "?wait=30", image_url=f"s3://datasets/{mark}")
        job_id = next(id_ for id_ in iter(lambda: _offered(worker, mark), None) if id_)
        worker.finish(job_id, worker.take(job_id), "completed", result=RESULT)
        ended_s = time.monotonic()
        answer = asked.result()
    assert time.monotonic() - ended_s < 5
    assert answer.status_code == 200
    assert answer.json()["status"] == "completed"
    assert answer.json()["result"] == RESULT


def _offered(worker: Talker, mark: str) -> str:
    """Return the id of the job on this image; empty while it is not offered."""
    found = worker.poll(lane="infer", slots=1000, wait=1)
    return next((job["job_id"] for job in found if mark in job["config"]["image_url"]), "")


def test_what_takes_longer_is_202_and_says_where_to_look(server: ReferenceServer, worker: Talker) -> None:
    answer = ask(server, "?wait=0.2")
    assert answer.status_code == 202
    told = answer.json()
    assert (told["status"], told["result"]) == ("queued", None)
    look = {
        "method": "GET",
        "url": server.url + told["url"],
        "headers": headers(server.edge_token),
        "timeout": 40,
    }
    assert requests.request(**look).status_code == 202
    error = {"code": "image_unavailable", "message": "404 for the image"}
    worker.finish(told["job_id"], worker.take(told["job_id"]), "failed", error=error)
    found = requests.request(**look)
    assert (found.status_code, found.json()["status"], found.json()["error"]) == (200, "failed", error)


def test_answer_says_why_a_job_was_handed_back_while_it_waits(
    server: ReferenceServer, worker: Talker
) -> None:
    job_id = ask(server).json()["job_id"]
    assert call(server, "GET", f"inference/{job_id}").json()["handed_back"] is None
    error = {"code": "image_unavailable", "message": "no such object"}
    worker.finish(job_id, worker.take(job_id), "queued", error=error)
    answer = call(server, "GET", f"inference/{job_id}").json()
    assert (answer["status"], answer["error"], answer["handed_back"]) == ("queued", None, error)
    call(server, "DELETE", f"job/{job_id}/cancel", server.admin_token)
    answer = call(server, "GET", f"inference/{job_id}").json()
    assert (answer["status"], answer["handed_back"]) == ("cancelled", None)


def test_question_asked_again_under_its_name_is_one_job(server: ReferenceServer, worker: Talker) -> None:
    seen = {"detections": [DETECTION], "image_size": [640, 480]}
    fields = {"request_id": "rvm7-0001234", "edge_result": seen, "purpose": "fraud_check"}
    job_id = ask(server, **fields).json()["job_id"]
    # Asked many times at once, as after a time-out that everybody met: still one.
    with ThreadPoolExecutor(8) as pool:
        again = list(pool.map(lambda _: ask(server, **{**fields, "request_id": "rvm7-0001235"}), range(8)))
    assert {answer.status_code for answer in again} == {202}
    assert len({answer.json()["job_id"] for answer in again}) == 1
    assert job_id != again[0].json()["job_id"]
    offered = {job["job_id"]: job["config"] for job in worker.poll(lane="infer", slots=100)}
    assert "request_id" not in offered[job_id]
    worker.finish(job_id, worker.take(job_id), "completed", result=RESULT)
    repeated = ask(server, "?wait=5", **fields)
    assert (repeated.status_code, repeated.json()["job_id"]) == (200, job_id)
    assert len(logs_of(server, job_id)) == 1


def test_name_of_a_question_is_good_for_no_other(server: ReferenceServer) -> None:
    first = ask(server, request_id="rvm7-0002000", model_version="v2").json()["job_id"]
    # What the models were called is the server's to fill in; the picture is not.
    assert ask(server, request_id="rvm7-0002000").json()["job_id"] == first
    other = ask(server, request_id="rvm7-0002000", image_url="s3://datasets/other.jpg")
    assert (other.status_code, list(other.json()["errors"])) == (422, ["request_id"])
    own = call(
        server,
        "POST",
        "inference",
        server.admin_token,
        json={"image_url": IMAGE, "request_id": "rvm7-0002000"},
    )
    assert (own.status_code, own.json()["job_id"] == first) == (202, False)


def test_held_requests_are_bounded(server: ReferenceServer) -> None:
    job_ids = [ask(server).json()["job_id"] for _ in range(4)]
    with ThreadPoolExecutor() as threads:
        held = [threads.submit(call, server, "GET", f"inference/{job_id}?wait=30") for job_id in job_ids[:3]]
        while server._services.held.held < 3:
            assert not any(each.done() for each in held)
        # The server's limit: one more is told at once to look again.
        assert call(server, "GET", f"inference/{job_ids[3]}?wait=30").status_code == 202
        assert not any(each.done() for each in held)
        for job_id in job_ids:
            server.cancel(job_id)
        assert {each.result().status_code for each in held} == {200}


def test_eighty_held_requests_leave_the_server_quick(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"m")
    with ReferenceServer(reap=False) as server, ThreadPoolExecutor(80) as threads:
        server.add_model(tmp_path / "m", model_name="yolo11", version="v1", active=True)
        # Twice as many as the server has threads.
        job_ids = [server.request_inference(image_url=IMAGE) for _ in range(80)]
        held = [
            threads.submit(call, server, "GET", f"inference/{job_id}?wait=20", server.admin_token)
            for job_id in job_ids
        ]
        while server._services.held.held < 80:
            assert not any(each.done() for each in held)
        start_s = time.monotonic()
        assert call(server, "GET", "health").status_code == 200
        assert time.monotonic() - start_s < 2
        for job_id in job_ids:
            server.cancel(job_id)
        assert {each.result().json()["status"] for each in held} == {"cancelled"}


def test_machine_sees_its_own_inferences_alone(server: ReferenceServer) -> None:
    job_id = ask(server).json()["job_id"]
    body = {"name": "another machine", "abilities": ["edge"]}
    other = call(server, "POST", "tokens", server.admin_token, json=body).json()["token"]
    assert call(server, "GET", f"inference/{job_id}", other).status_code == 404
    assert call(server, "GET", f"inference/{job_id}", server.admin_token).status_code == 202
    assert call(server, "GET", "inference/none", server.admin_token).status_code == 404


def test_each_token_may_do_its_own(server: ReferenceServer) -> None:
    tokens = {"worker": server.worker_token, "admin": server.admin_token, "edge": server.edge_token}
    calls = {
        ("POST", "inference"): {"admin", "edge"},
        ("GET", "inference/none"): {"admin", "edge"},
        ("POST", "batch-inference"): {"admin"},
        ("POST", "playground-inference"): {"admin"},
        ("GET", "inference-jobs"): {"admin"},
        ("GET", "inference-logs"): {"admin"},
        ("GET", "batches"): {"admin"},
        ("GET", "batch/none"): {"admin"},
        ("DELETE", "batch/none/cancel"): {"admin"},
        ("GET", "alerts"): {"admin"},
        ("POST", "alerts/99999/acknowledge"): {"admin"},
        ("GET", f"images/{'0' * 64}"): {"worker", "admin"},
        ("GET", f"manifests/{'0' * 64}"): {"worker", "admin"},
    }
    for (method, path), allowed in calls.items():
        body = {"json": {}} if method == "POST" else {}
        admitted = {
            name
            for name, token in tokens.items()
            if call(server, method, path, token, **body).status_code != 403
        }
        assert admitted == allowed, path


def test_log_keeps_a_completed_inference_once_without_its_masks(
    server: ReferenceServer, worker: Talker
) -> None:
    job_id = ask(server, purpose="fraud_check").json()["job_id"]
    token, finish_id = worker.take(job_id), str(uuid.uuid4())
    comparison = {"matches": [], "mismatch": False, "reasons": []}
    result = {**RESULT, "comparison": comparison}
    with ThreadPoolExecutor() as threads:
        sent = [
            threads.submit(worker.finish, job_id, token, "completed", finish_id, result=result)
            for _ in range(8)
        ]
        assert {each.result().status_code for each in sent} == {200}
    assert worker.finish(job_id, token, "completed", result=result).status_code == 409
    (log,) = logs_of(server, job_id)
    assert log["detections"] == [DETECTION]
    assert (log["processed_by"], log["purpose"], log["comparison"]) == (
        "cv-server",
        "fraud_check",
        comparison,
    )
    assert (log["model_used"], log["processing_time_ms"]) == ("yolo11_v3.pt", 152)
    assert server.job(job_id)["result"] == result
    page = call(server, "GET", "inference-logs?purpose=fraud_check&per_page=1", server.admin_token).json()
    assert page["data"] == [log]


def test_log_says_where_a_large_result_lies(server: ReferenceServer, worker: Talker) -> None:
    job_id = ask(server).json()["job_id"]
    result = {"result_path": "s3://artifacts/x/result.json", "sha256": "0" * 64, "model_used": "v3"}
    worker.finish(job_id, worker.take(job_id), "completed", result=result)
    (log,) = logs_of(server, job_id)
    assert (log["detections"], log["result_path"]) == ([], result["result_path"])


@pytest.mark.parametrize(
    "result",
    [
        {"detections": {"a": 1}, "comparison": [1], "processing_time_ms": "slow", "model_used": 3},
        {"detections": ["x", 1], "comparison": {"mismatch": "yes"}, "processing_time_ms": 10**400},
        {"detections": [{"class": "\ud800\0", "confidence": 1}], "model_used": "\ud800\0" * 99},
        {"comparison": {"mismatch": True, "reasons": ["x", {"message": "\ud800\0"}]}},
    ],
)
def test_result_that_makes_no_sense_is_logged_as_far_as_it_does(
    server: ReferenceServer, worker: Talker, result: dict[str, Any]
) -> None:
    job_id = ask(server).json()["job_id"]
    answer = worker.finish(job_id, worker.take(job_id), "completed", result=result)
    assert answer.status_code == 200, answer.text
    (log,) = logs_of(server, job_id)
    assert log["processing_time_ms"] is None
    page = call(server, "GET", "inference-logs?per_page=1", server.admin_token)
    assert page.json()["data"] == [log]
    assert call(server, "GET", "alerts?per_page=1", server.admin_token).status_code == 200


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_log_leaves_out_what_was_not_completed(server: ReferenceServer, worker: Talker, status: str) -> None:
    job_id = ask(server).json()["job_id"]
    error = {"code": "image_invalid", "message": "no image"}
    worker.finish(job_id, worker.take(job_id), status, error=error, result=RESULT)
    assert logs_of(server, job_id) == []


def test_playground_takes_an_image_and_the_worker_fetches_it(server: ReferenceServer, worker: Talker) -> None:
    image = uuid.uuid4().bytes
    form = {
        "confidence_threshold": "0.4",
        "segmentation": "true",
        "model_version": "candidate",
        "img_size": "",
    }
    answer = call(
        server,
        "POST",
        "playground-inference",
        server.admin_token,
        data=form,
        files={"image": ("bottle.jpg", image)},
    )
    assert (answer.status_code, answer.json()["priority"]) == (202, 5)
    config = server.job(answer.json()["job_id"])["config"]
    assert (config["purpose"], config["confidence_threshold"], config["segmentation"]) == (
        "playground",
        0.4,
        True,
    )
    assert (config["model_sha256"], config["model_active"]) == (sha256("candidate"), False)
    assert config["image_sha256"] == hashlib.sha256(image).hexdigest()
    got = worker.http.get(server.url + config["image_url"], timeout=10)
    assert (got.content, got.headers["X-SHA256-Hash"]) == (image, config["image_sha256"])
    jobs = call(server, "GET", "inference-jobs?per_page=1", server.admin_token).json()
    assert jobs["data"][0]["job_id"] == answer.json()["job_id"]


@pytest.mark.parametrize(
    ("form", "files", "field"),
    [
        ({}, {}, "image"),
        ({"image": "text"}, {}, "image"),
        ({}, {"image": ("x.jpg", b"")}, "image"),
        ({"confidence_threshold": "1.5"}, {"image": ("x.jpg", b"x")}, "confidence_threshold"),
        ({"confidence_threshold": "nan"}, {"image": ("x.jpg", b"x")}, "confidence_threshold"),
        ({"segmentation": "perhaps"}, {"image": ("x.jpg", b"x")}, "segmentation"),
        ({"color": "red"}, {"image": ("x.jpg", b"x")}, "color"),
        ({"model_version": "none-such"}, {"image": ("x.jpg", b"x")}, "model_version"),
    ],
)
def test_bad_playground_form_names_the_field(
    server: ReferenceServer, form: dict[str, str], files: dict[str, Any], field: str
) -> None:
    # With a file that is not asked for, so that it is a form at all.
    parts = files or {"nothing": ("x", b"x")}
    answer = call(server, "POST", "playground-inference", server.admin_token, data=form, files=parts)
    assert (answer.status_code, list(answer.json()["errors"])) == (422, [field]), answer.text


def test_playground_wants_a_form(server: ReferenceServer) -> None:
    answer = call(server, "POST", "playground-inference", server.admin_token, json={"image": "x"})
    assert answer.status_code == 422
    assert call(server, "POST", "inference", data={"a": "b"}).status_code == 415


def test_uploaded_image_has_a_limit() -> None:
    with ReferenceServer(reap=False, settings=Settings(image_limit_bytes=1000)) as server:
        files = {"image": ("x.jpg", b"x" * 1001)}
        answer = call(server, "POST", "playground-inference", server.admin_token, files=files)
        assert answer.status_code == 413
