"""A real training that is killed in the middle goes on where it was, and counts as one."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker.demo.drawing import draw_zip
from rvmcv_worker.reference.server import ReferenceServer
from tests.training_jobs import SMALL
from tests.worker_process import WorkerProcess

pytest.importorskip("torch", reason="the extra `compute` is not installed")
pytestmark = pytest.mark.slow

EPOCHS = 8


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, shared_server: ReferenceServer) -> Iterator[dict[str, Any]]:
    """A training whose daemon was killed after two epochs, and its second attempt stopped while measuring."""
    file = tmp_path_factory.mktemp("drawn") / "drawn.zip"
    draw_zip(file, train=16, val=8, test=4, size_px=96, seed=1)
    url = shared_server.put_object("datasets", "drawn.zip", file)
    job_id = shared_server.queue_training({**SMALL, "epochs": EPOCHS, "dataset_url": url})
    directory = tmp_path_factory.mktemp("worker")
    with WorkerProcess(directory, shared_server, job_types=("yolo11",), scale=0.02) as worker:
        shared_server.wait_for_job(job_id, lambda job: len(job["history"]) >= 2, 60)
        worker.kill()
        worker.start()
        shared_server.wait_for_job(job_id, lambda job: job["attempt"] == 2 and _measures(job), 60)
        worker.stop()
        worker.start()
        yield shared_server.wait_until_final(job_id, 60)
        assert worker.workspace_files() == []


def _measures(job: dict[str, Any]) -> bool:
    return bool(job["phase"] == "evaluate" and job["progress"]["epoch"] == EPOCHS)


def test_each_attempt_went_on_from_the_one_before(job: dict[str, Any]) -> None:
    assert (job["status"], job["attempt"]) == ("completed", 3), job["error"]
    codes = [(attempt["error"] or {}).get("code") for attempt in job["attempts"]]
    assert codes == ["worker_died", "worker_stopped", None]
    first, second = job["result"]["attempts"]
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert first["epochs"] >= 1
    assert first["epochs"] + second["epochs"] == EPOCHS
    assert {first["batch_size"], second["batch_size"]} == {8}


def test_every_epoch_is_told_once_and_lies_in_the_table(
    shared_server: ReferenceServer, job: dict[str, Any]
) -> None:
    assert [entry["epoch"] for entry in job["history"]] == list(range(1, EPOCHS + 1))
    assert all(entry["losses"]["box_loss"] >= 0 for entry in job["history"])
    table = shared_server.read_object(job["result"]["artifacts"]["results.csv"]).decode()
    assert [int(row["epoch"]) for row in csv.DictReader(table.splitlines())] == list(range(1, EPOCHS + 1))


def test_it_is_measured_and_delivered_as_any_other(
    shared_server: ReferenceServer, job: dict[str, Any]
) -> None:
    result = job["result"]
    assert 0 <= result["metrics"]["mAP50"] <= 1
    assert result["metrics"]["test"]["mAP50"] >= 0
    assert result["effective"]["epochs"] == EPOCHS
    assert result["check"]["sha256"] == result["sha256_hash"]
    assert result["version"].endswith("-a3")
    assert {"results.png", "confusion_matrix.png", "train.log"} <= set(result["artifacts"])
    (model,) = (model for model in shared_server.models() if model["training_job_id"] == job["id"])
    assert model["usable"]


def test_the_stored_checkpoint_tells_nothing_of_where_it_was_made(
    tmp_path: Path, shared_server: ReferenceServer, job: dict[str, Any]
) -> None:
    content = shared_server.read_object(job["checkpoint"]["path"])
    assert "/attempt-2/checkpoint-" in job["checkpoint"]["path"]
    assert job["checkpoint"]["epoch"] == EPOCHS
    for trace in (b"/job/", str(Path.home()).encode() + b"/", str(tmp_path.parents[1]).encode(), b"worker-"):
        assert trace not in content
