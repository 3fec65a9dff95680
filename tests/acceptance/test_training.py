"""A real training, from the queue to its row in `ai_model_versions`, and inputs that must not get there."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from rvmcv_worker.demo.drawing import draw_zip
from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings
from tests.training_jobs import SMALL, first_error
from tests.worker_process import WorkerProcess

pytest.importorskip("torch", reason="the extra `compute` is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("drawn") / "drawn.zip"
    return draw_zip(file, train=16, val=8, test=4, size_px=96, seed=1)


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer) -> ReferenceServer:
    return shared_server


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> Iterator[WorkerProcess]:
    directory = tmp_path_factory.mktemp("worker")
    with WorkerProcess(directory, server, job_types=("yolo11",), scale=0.02) as running:
        yield running


@pytest.fixture(scope="module")
def trained(server: ReferenceServer, worker: WorkerProcess, archive: Path) -> dict[str, object]:
    url = server.put_object("datasets", "drawn.zip", archive)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    config = {**SMALL, "dataset_url": url, "dataset_sha256": sha256, "safetensors": True}
    job_id = server.queue_training(config)
    job = server.wait_until_final(job_id, 180)
    assert job["status"] == "completed", job["error"]
    assert worker.workspace_files() == []
    assert worker.tree() == []
    return job


def test_the_row_names_the_bytes_that_are_stored(server: ReferenceServer, trained: dict) -> None:
    (model,) = [model for model in server.models() if model["training_job_id"] == trained["id"]]
    stored = server.read_object(model["file_path"])
    assert hashlib.sha256(stored).hexdigest() == model["sha256_hash"] == trained["result"]["sha256_hash"]
    assert model["usable"]
    assert model["version"].endswith("-a1")


def test_the_weights_come_as_safetensors_where_a_job_wants_them(
    server: ReferenceServer, trained: dict, tmp_path: Path
) -> None:
    from safetensors.torch import load

    found = load(server.read_object(trained["result"]["artifacts"]["best.safetensors"]))
    assert sum(tensor.numel() for tensor in found.values()) > 2_500_000
    assert {str(tensor.dtype) for tensor in found.values()} == {"torch.float16", "torch.int64"}


def test_every_epoch_is_told_once_and_in_order(trained: dict) -> None:
    assert [entry["epoch"] for entry in trained["history"]] == [1, 2]
    for entry in trained["history"]:
        assert {"losses", "metrics", "lr", "epoch_s", "eta_s"} <= set(entry)


def test_the_result_says_what_was_measured_and_with_what(server: ReferenceServer, trained: dict) -> None:
    result = trained["result"]
    for key in ("precision", "recall", "mAP50", "mAP50-95", "fitness"):
        assert 0 <= result["metrics"][key] <= 1
    assert set(result["metrics"]["per_class"]) == {"bottle", "can"}
    assert result["metrics"]["test"]["mAP50"] >= 0
    assert result["effective"]["epochs"] == 2
    assert result["effective"]["versions"]["ultralytics"]
    assert result["data"]["splits"]["train"]["images"] == 16
    assert {"results.csv", "results.png", "data-report.json", "train.log"} <= set(result["artifacts"])
    csv = server.read_object(result["artifacts"]["results.csv"]).decode()
    assert len(csv.splitlines()) == 3


def test_the_next_training_is_measured_beside_the_active_model(
    server: ReferenceServer, worker: WorkerProcess, trained: dict
) -> None:
    (model,) = [model for model in server.models() if model["training_job_id"] == trained["id"]]
    server.activate(model["id"])
    config = {**trained["config"], "base_model": model["version"], "epochs": 1}
    job = server.wait_until_final(server.queue_training(config), 180)
    assert job["status"] == "completed", job["error"]
    active = job["result"]["metrics"]["active"]
    assert active["sha256"] == model["sha256_hash"]
    assert active["mAP50"] == pytest.approx(trained["result"]["metrics"]["mAP50"], abs=1e-6)


def test_a_missing_data_set_and_a_wrong_checksum_hand_the_job_back(
    server: ReferenceServer, worker: WorkerProcess, archive: Path
) -> None:
    error = first_error(server, worker, {"dataset_url": "s3://datasets/none.zip"})
    assert (error["code"], "none.zip" in error["message"]) == ("dataset_unavailable", True)
    error = first_error(server, worker, {"dataset_id": 999})
    assert (error["code"], "999" in error["message"]) == ("dataset_unavailable", True)
    url = server.put_object("datasets", "drawn.zip", archive)
    error = first_error(server, worker, {"dataset_url": url, "dataset_sha256": "0" * 64})
    assert error["code"] == "checksum_mismatch"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://169.254.169.254/x", "https://me@vm100/x"])
def test_a_forbidden_url_is_refused(server: ReferenceServer, worker: WorkerProcess, url: str) -> None:
    assert first_error(server, worker, {"dataset_url": url})["code"] == "url_forbidden"


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


def test_a_base_model_that_runs_code_or_is_cut_off_is_refused(
    server: ReferenceServer, worker: WorkerProcess, archive: Path, trained: dict, tmp_path: Path
) -> None:
    url = server.put_object("datasets", "drawn.zip", archive)
    marker = tmp_path / "it-ran"
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps(_Evil(marker)))
    pickle.loads(evil.read_bytes())
    assert marker.exists(), "the attack works without the defence"
    marker.unlink()
    server.add_model(evil, model_name="yolo11", version="evil")
    assert first_error(server, worker, {"dataset_url": url, "base_model": "evil"})["code"] == "model_invalid"
    assert not marker.exists()
    cut = tmp_path / "cut.pt"
    (model,) = [model for model in server.models() if model["training_job_id"] == trained["id"]]
    cut.write_bytes(server.read_object(model["file_path"])[:500_000])
    server.add_model(cut, model_name="yolo11", version="cut")
    assert first_error(server, worker, {"dataset_url": url, "base_model": "cut"})["code"] == "model_invalid"
    assert (
        first_error(server, worker, {"dataset_url": url, "base_model": "none"})["code"] == "model_unavailable"
    )


def test_a_training_gets_through_to_a_server_as_it_is_today(tmp_path: Path, archive: Path) -> None:
    with ReferenceServer(tmp_path / "server", settings=Settings(as_today=True)) as server:
        url = server.put_object("datasets", "drawn.zip", archive)
        with WorkerProcess(tmp_path / "worker", server, job_types=("yolo11",), scale=0.02) as worker:
            job_id = server.queue_training({**SMALL, "epochs": 1, "dataset_url": url})
            job = server.wait_until_final(job_id, 180)
            assert job["status"] == "completed", job["error"]
            (model,) = server.models()
            assert hashlib.sha256(server.read_object(model["file_path"])).hexdigest() == model["sha256_hash"]
            assert worker.workspace_files() == []
