"""Row 27 of the fault list: files that arrive as others than they left."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.bad_network import BadNetwork
from tests.fault_stage import Stage, open_stage
from tests.network_faults import Visit, drop_request
from tests.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

RUBBISH = b"this is no archive" * 1000


class StorageStage(NamedTuple):
    stage: Stage
    storage: BadNetwork  #: before the object store; a request's kind is its bucket


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageStage]:
    directory = tmp_path_factory.mktemp("transfers")
    with (
        open_stage(directory, scale=0.01, start=False) as stage,
        BadNetwork(stage.server.s3_endpoint) as storage,
    ):
        place = storage.url.removeprefix("http://")
        between = {"s3_endpoint": storage.url, "allowed_hosts": [place], "plain_http_hosts": [place]}
        worker = WorkerProcess(
            directory / "between",
            stage.server,
            url=stage.network.url,
            job_types=("stub", "yolo11"),
            scale=0.01,
            extra={"storage": between},
        )
        with worker:
            yield StorageStage(dataclasses.replace(stage, worker=worker), storage)


def _spoil(visit: Visit) -> None:
    """One byte of a file is another on arrival."""
    answer = visit.forward()
    if answer is not None and answer.body:
        answer = dataclasses.replace(answer, body=b"X" + answer.body[1:])
    visit.reply(answer)


def _train_on_rubbish(stage: Stage, tmp_path: Path) -> str:
    """Queue a training that ends as `dataset_invalid` once its data set has arrived as it was."""
    file = tmp_path / "rubbish.zip"
    file.write_bytes(RUBBISH)
    if not stage.server.models():
        stage.server.add_model(file, model_name="yolo11", version="of-ours.pt")
    path = stage.server.put_object("datasets", "rubbish.zip", file)
    sha256 = hashlib.sha256(RUBBISH).hexdigest()
    config = {"dataset_url": path, "dataset_sha256": sha256, "base_model": "of-ours.pt"}
    return stage.server.queue_training(config)


def test_row_27_a_spoiled_download_is_fetched_again(opened: StorageStage, tmp_path: Path) -> None:
    stage, storage = opened
    rule = storage.on("datasets", _spoil)
    job_id = _train_on_rubbish(stage, tmp_path)
    rule.wait()
    job = stage.server.wait_until_final(job_id, 30)
    assert [attempt["error"]["code"] for attempt in job["attempts"]] == ["dataset_invalid"]
    stage.nothing_is_left()


def test_row_27_a_download_that_stays_spoiled_is_a_checksum_mismatch(
    opened: StorageStage, tmp_path: Path
) -> None:
    stage, storage = opened
    rule = storage.on("datasets", _spoil, times=None)
    job_id = _train_on_rubbish(stage, tmp_path)
    assert stage.first_error(job_id)["code"] == "checksum_mismatch"
    assert rule.taken > 1
    rule.release()
    stage.server.cancel(job_id)
    stage.nothing_is_left()


def test_row_27_an_upload_that_is_cut_is_repeated(opened: StorageStage) -> None:
    stage, storage = opened
    rule = storage.on("models", drop_request)
    job_id = stage.queue(payload_bytes=100_000)
    rule.wait()
    job = stage.completes(job_id)
    stored = stage.server.read_object(job["result"]["artifacts"]["model.bin"])
    assert len(stored) == 100_000
    stage.nothing_is_left()


def test_row_27_an_upload_that_is_always_cut_announces_nothing(opened: StorageStage) -> None:
    stage, storage = opened
    rule = storage.on("models", drop_request, times=None)
    job_id = stage.queue()
    assert stage.first_error(job_id)["code"] == "upload_failed"
    rule.release()
    told = [request.said for request in stage.network.seen("finish", job_id)]
    assert {body["status"] for body in told} == {"queued"}
    assert not any("artifacts" in str(body) for body in told)
    stage.server.cancel(job_id)
    stage.nothing_is_left()
