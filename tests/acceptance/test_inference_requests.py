"""What RVM-Server is asked for, through real daemons: a long batch that two share, a try, a fraud check."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings
from tests import tiny_model
from tests.dataset_fixtures import draw
from tests.reference_talker import headers
from tests.worker_process import WorkerProcess, eventually

pytestmark = pytest.mark.slow

PATIENCE_S = 120.0
SHARD_SIZE = 5
ASKED = {"confidence_threshold": tiny_model.ANY_CONFIDENCE, "max_detections": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceServer]:
    folder = tmp_path_factory.mktemp("server")
    with ReferenceServer(folder, settings=Settings(shard_size=SHARD_SIZE)) as running:
        tiny = tiny_model.make(folder / "tiny.pt")
        running.add_model(tiny, model_name="yolo11", version="tiny_v1", active=True)
        for number in range(14):
            picture = folder / "picture.jpg"
            picture.write_bytes(draw(number, (96, 64)))
            running.put_object("datasets", f"{number}.jpg", picture)
        yield running


@pytest.fixture(scope="module", autouse=True)
def workers(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> Iterator[None]:
    extra: dict[str, dict[str, object]] = {"inference": {"backend": "torch"}}
    options: dict[str, Any] = {"job_types": ("inference", "batch-inference"), "scale": 0.02, "extra": extra}
    with (
        WorkerProcess(tmp_path_factory.mktemp("one"), server, worker_id="one", **options),
        WorkerProcess(tmp_path_factory.mktemp("two"), server, worker_id="two", **options),
    ):
        # Both poll: neither is still starting while the other takes all.
        eventually(lambda: {each["worker_id"] for each in server.workers()} == {"one", "two"}, PATIENCE_S)
        yield


def ask(server: ReferenceServer, path: str, token: str, **body: Any) -> dict[str, Any]:
    """Ask, and look again until it is over."""
    url = f"{server.url}/api/v1/cv/{path}?wait=30"
    answer = requests.post(url, headers=headers(token), timeout=40, **body)
    while answer.status_code == 202:
        look = f"{server.url}{answer.json()['url']}?wait=30"
        answer = requests.get(look, headers=headers(token), timeout=40)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_two_workers_share_a_long_batch(server: ReferenceServer) -> None:
    images = [{"id": number, "url": f"s3://datasets/{number}.jpg"} for number in range(14)]
    batch_id = server.request_batch(images=images, part_size=2, **ASKED)
    jobs = [
        server.wait_until_final(shard["job_id"], PATIENCE_S) for shard in server.batch(batch_id)["shards"]
    ]
    assert len({attempt["worker_id"] for job in jobs for attempt in job["attempts"]}) == 2
    batch = server.batch(batch_id)
    assert (batch["status"], batch["images_done"]) == ("completed", 14), batch
    summary = batch["summary"]
    assert (summary["images_ok"], summary["images_failed"], summary["missing"]) == (14, 0, [])
    assert summary["latency_is"] == "histogram"
    ids = []
    for part in summary["parts"]:
        lines = gzip.decompress(server.read_object(part["path"])).splitlines()
        assert part["first_index"] == len(ids)
        ids += [json.loads(line)["id"] for line in lines]
    assert ids == list(range(14))
    (log,) = [each for each in server.inference_logs() if each["job_id"] == batch_id]
    assert log["summary"]["images_ok"] == 14


def test_fraud_check_that_mismatches_is_answered_logged_and_alerted(server: ReferenceServer) -> None:
    seen = {"detections": [{"class": "no such class", "confidence": 0.2, "bbox": [0, 0, 5, 5]}]}
    fields = {"image_url": "s3://datasets/1.jpg", "purpose": "fraud_check", "edge_result": seen, **ASKED}
    answer = ask(server, "inference", server.edge_token, json=fields)
    assert answer["status"] == "completed", answer
    assert answer["result"]["comparison"]["mismatch"] is True
    (log,) = [each for each in server.inference_logs() if each["job_id"] == answer["job_id"]]
    assert (log["purpose"], log["model_used"]) == ("fraud_check", "tiny_v1")
    assert log["comparison"] == answer["result"]["comparison"]
    (alert,) = [each for each in server.alerts() if each["job_id"] == answer["job_id"]]
    assert alert["kind"] == "mismatch"


def test_uploaded_picture_is_tried(server: ReferenceServer) -> None:
    form = {
        "data": {name: str(value) for name, value in ASKED.items()},
        "files": {"image": draw(3, (96, 64))},
    }
    answer = ask(server, "playground-inference", server.admin_token, **form)
    assert answer["status"] == "completed", answer
    assert answer["result"]["image_size"] == [96, 64]
    assert len(answer["result"]["detections"]) == 2
