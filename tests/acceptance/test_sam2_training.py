"""A fine-tuning of SAM2 through the real daemon: from the queue to masks that the delivered model makes."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker.demo.drawing import draw_files, draw_zip
from rvmcv_worker.jobs.sam2_sizes import MODEL_BYTES, UPLOAD_BYTES
from rvmcv_worker.model_store import ModelStore
from rvmcv_worker.reference.server import ReferenceServer
from tests import tiny_model
from tests.front import front
from tests.training_jobs import SMALL_SAM2, first_error
from tests.worker_process import WorkerProcess

torch = pytest.importorskip("torch", reason="the extra `compute` is not installed")
pytestmark = pytest.mark.slow

PATIENCE_S = 240.0
EPOCHS = 3
DRAWN: dict[str, Any] = {"train": 4, "val": 2, "test": 1, "size_px": 96, "seed": 1}
MEASURES = {"miou", "miou_click", "boundary_f"}


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer) -> ReferenceServer:
    return shared_server


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> str:
    file = draw_zip(tmp_path_factory.mktemp("drawn") / "drawn.zip", segment=True, **DRAWN)
    return server.put_object("datasets", "drawn.zip", file)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> Iterator[WorkerProcess]:
    """One daemon for the module, so that each test also shows that the next job runs."""
    with WorkerProcess(
        tmp_path_factory.mktemp("worker"),
        server,
        job_types=("sam2", "inference"),
        scale=0.02,
        extra={"inference": {"backend": "torch"}},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> str:
    """The version of a YOLO11 that finds something in any picture."""
    file = tiny_model.make(tmp_path_factory.mktemp("detector") / "tiny.pt")
    server.add_model(file, model_name="yolo11", version="tiny")
    return "tiny"


def _queue(server: ReferenceServer, data_url: str, **config: Any) -> str:
    return server.queue_training({**SMALL_SAM2, "dataset_url": data_url, **config}, job_type="sam2")


@pytest.fixture(scope="module")
def trained(server: ReferenceServer, worker: WorkerProcess, data_url: str) -> dict[str, Any]:
    job_id = _queue(server, data_url, epochs=EPOCHS, patience=0, safetensors=True)
    job = server.wait_until_final(job_id, PATIENCE_S)
    assert job["status"] == "completed", job["error"]
    assert worker.workspace_files() == []
    assert worker.tree() == []
    return job


def _weights(server: ReferenceServer, job: dict[str, Any]) -> dict[str, Any]:
    content = torch.load(
        io.BytesIO(server.read_object(job["result"]["result_model_path"])), weights_only=True
    )
    weights: dict[str, Any] = content["model"]
    return weights


def test_the_row_names_the_bytes_that_are_stored(server: ReferenceServer, trained: dict[str, Any]) -> None:
    (model,) = (model for model in server.models() if model["training_job_id"] == trained["id"])
    stored = server.read_object(model["file_path"])
    assert hashlib.sha256(stored).hexdigest() == model["sha256_hash"] == trained["result"]["sha256_hash"]
    assert (model["model_name"], model["usable"], model["is_active"]) == ("sam2", True, False)
    assert model["version"].endswith("-a1")
    assert len(stored) == pytest.approx(MODEL_BYTES["sam2.1_hiera_tiny"], rel=0.005)


def test_the_result_says_what_was_measured_and_what_it_began_with(
    server: ReferenceServer, trained: dict[str, Any]
) -> None:
    result = trained["result"]
    metrics = result["metrics"]
    for score in (metrics, metrics["base"], metrics["box_as_mask"], metrics["test"]):
        assert set(score) >= MEASURES
        assert 0 <= score["miou"] <= 1
    assert metrics["fitness"] == metrics["miou"]
    assert metrics["improved"] == ("NOT" not in metrics["verdict"])
    assert (metrics["task"], metrics["classes"], metrics["leaks"]) == ("segment", ["bottle", "can"], 0)
    assert set(metrics["per_class"]) == {"bottle", "can"}
    assert metrics["active"] is None
    assert 1 <= metrics["best_epoch"] <= EPOCHS
    assert result["check"]["sha256"] == result["sha256_hash"]
    assert (result["effective"]["train"], result["effective"]["base_model"]) == ("decoder", "scratch")
    assert {"torch", "sam2"} <= set(result["effective"]["versions"])
    (piece,) = result["attempts"]
    assert (piece["attempt"], piece["epochs"], piece["batch_size"], piece["img_size"]) == (1, EPOCHS, 2, 64)
    assert result["data"]["splits"]["train"]["images"] == DRAWN["train"]


def test_curves_and_pictures_are_stored(server: ReferenceServer, trained: dict[str, Any]) -> None:
    artifacts = trained["result"]["artifacts"]
    assert set(artifacts) == {
        "best.safetensors",
        "results.csv",
        "curves.png",
        "masks.jpg",
        "args.yaml",
        "data-report.json",
        "train.log",
        "prepare.log",
    }
    assert len(server.read_object(artifacts["results.csv"]).decode().splitlines()) == 1 + EPOCHS
    assert server.read_object(artifacts["masks.jpg"])[:3] == b"\xff\xd8\xff"
    assert server.read_object(artifacts["curves.png"])[:4] == b"\x89PNG"
    from safetensors.torch import load

    weights, safe = _weights(server, trained), load(server.read_object(artifacts["best.safetensors"]))
    assert weights.keys() == safe.keys()
    assert all(torch.equal(weights[name], safe[name]) for name in weights)


def test_every_epoch_is_told_once_with_the_base_beside_it(
    server: ReferenceServer, trained: dict[str, Any]
) -> None:
    assert [entry["epoch"] for entry in trained["history"]] == list(range(1, EPOCHS + 1))
    for entry in trained["history"]:
        assert {"losses", "metrics", "lr", "epoch_s", "eta_s"} <= set(entry)
        assert set(entry["metrics"]) >= {*MEASURES, *(f"base/{name}" for name in MEASURES)}
    (box, click, boundary) = trained["mask_scores"]["scores"]
    assert (box["model"], box["base"]) == (
        trained["result"]["metrics"]["miou"],
        trained["result"]["metrics"]["base"]["miou"],
    )
    assert None not in (click["model"], boundary["box_as_mask"])


def test_the_delivered_model_makes_the_masks_of_an_inference(
    server: ReferenceServer, worker: WorkerProcess, trained: dict[str, Any], detector: str, tmp_path: Path
) -> None:
    name, picture = next((n, c) for n, c in draw_files(segment=True, **DRAWN) if n.endswith(".jpg"))
    file = tmp_path / Path(name).name
    file.write_bytes(picture)
    job_id = server.request_inference(
        image_url=server.put_object("datasets", "picture.jpg", file),
        model_version=detector,
        confidence_threshold=tiny_model.ANY_CONFIDENCE,
        max_detections=2,
        segmentation=True,
        mask_format="rle",
        segmenter=trained["result"]["version"],
    )
    job = server.wait_for_job(
        job_id, lambda job: bool(job["attempts"] and job["attempts"][0]["ended_as"]), PATIENCE_S
    )
    assert job["status"] == "completed", job["attempts"]
    result = job["result"]
    assert result["segmenter_used"] == trained["result"]["version"]
    assert len(result["detections"]) == 2
    for found in result["detections"]:
        assert found["segmentation"]["size"] == [DRAWN["size_px"]] * 2


def test_a_killed_training_goes_on_and_becomes_what_it_would_have_become(
    server: ReferenceServer, worker: WorkerProcess, data_url: str, trained: dict[str, Any]
) -> None:
    job_id = _queue(server, data_url, epochs=EPOCHS, patience=0)
    server.wait_for_job(job_id, lambda job: len(job["history"]) >= 2, PATIENCE_S)
    worker.kill()
    worker.start()
    job = server.wait_until_final(job_id, PATIENCE_S)
    assert (job["status"], job["attempt"]) == ("completed", 2), job["error"]
    assert [(attempt["error"] or {}).get("code") for attempt in job["attempts"]] == ["worker_died", None]
    first, second = job["result"]["attempts"]
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert first["epochs"] + second["epochs"] == EPOCHS
    assert [entry["epoch"] for entry in job["history"]] == list(range(1, EPOCHS + 1))
    assert [entry["metrics"] for entry in job["history"]] == [e["metrics"] for e in trained["history"]]
    whole, resumed = _weights(server, trained), _weights(server, job)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert worker.workspace_files() == []


def test_a_running_one_is_shown_and_can_be_cancelled(
    server: ReferenceServer, worker: WorkerProcess, data_url: str
) -> None:
    job_id = _queue(server, data_url, epochs=100_000, patience=0)
    server.wait_for_job(job_id, lambda job: len(job["history"]) >= 1, PATIENCE_S)
    command = [sys.executable, "-m", "rvmcv_worker.cli", "status", "--config", str(worker.config_file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{job_id}  sam2, attempt 1, " in said
    assert " %  train, epoch " in said
    assert "/100000" in said
    assert server.job(job_id)["mask_scores"]["improved"] is None
    server.cancel(job_id)
    assert server.wait_until_final(job_id, 30)["status"] == "cancelled"
    assert worker.workspace_files() == []
    assert worker.tree() == []


def test_boxes_are_no_masks_to_train_on(
    server: ReferenceServer, worker: WorkerProcess, tmp_path: Path
) -> None:
    url = server.put_object("datasets", "boxes.zip", draw_zip(tmp_path / "boxes.zip", **DRAWN))
    job_id = _queue(server, url)
    job = server.wait_until_final(job_id, PATIENCE_S)
    assert (job["status"], job["error"]["code"]) == ("failed", "dataset_invalid")
    assert set(job["error"]["details"]["fault_counts"]) == {"box_in_segment"}
    assert {"data-report.json", "prepare.log"} <= set(job["result"]["artifacts"])


def test_a_base_model_that_is_no_sam2_is_refused(
    server: ReferenceServer, worker: WorkerProcess, data_url: str, detector: str
) -> None:
    error = first_error(server, worker, {"dataset_url": data_url, "base_model": detector}, "sam2")
    assert (error["code"], "YOLO11" in error["message"]) == ("model_invalid", True)
    error = first_error(server, worker, {"dataset_url": data_url, "base_model": "none"}, "sam2")
    assert error["code"] == "model_unavailable"


def test_a_config_that_is_wrong_is_refused_with_its_field(
    server: ReferenceServer, worker: WorkerProcess, data_url: str
) -> None:
    error = first_error(server, worker, {"dataset_url": data_url, "gpus": 2}, "sam2")
    assert (error["code"], "SAM2 trains on one" in error["message"]) == ("invalid_job", True)


def test_a_model_that_nobody_would_take_is_refused_before_it_is_trained(
    tmp_path: Path,
) -> None:
    # No data set is there: whoever fetched it first would say so.
    config: dict[str, object] = {"dataset_url": "s3://datasets/none.zip"}
    file = tmp_path / "other-name.pt"
    with file.open("wb") as hollow:
        hollow.truncate(UPLOAD_BYTES + 2**20)
    ModelStore(tmp_path / "worker" / "state" / "models", 2**30).add(file, name="other-name")
    with (
        ReferenceServer(tmp_path / "server") as server,
        front(server, lambda path, _body: not path.endswith("/job-uploads")) as url,
        WorkerProcess(
            tmp_path / "worker",
            server,
            url=url,
            job_types=("sam2",),
            s3_keys=False,
            scale=0.02,
            extra={"limits": {"max_model_mb": 500.0}},
        ) as worker,
    ):
        for wrong, said in (
            (
                {"architecture": "sam2.1_hiera_large"},
                "large makes a best.pt of 857 MB, over this worker's limit",
            ),
            (
                {"base_model": "sam2.1_hiera_base_plus"},
                "over the 200 MB that upload-model takes, and this worker",
            ),
            ({"base_model": "other-name"}, "other-name makes a best.pt of 201 MB, over the 200 MB"),
        ):
            error = first_error(server, worker, {**config, **wrong}, "sam2")
            assert (error["code"], said in error["message"]) == ("unsupported_job", True), error
