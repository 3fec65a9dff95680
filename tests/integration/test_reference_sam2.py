"""A fine-tuning of SAM2 as the reference server keeps and shows it; the worker's side is spoken by hand."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings
from tests.reference_talker import Talker, headers

HOSTILE = "<script>alert(1)</script>"
BASE = {"miou": 0.61234, "miou_click": 0.5, "boundary_f": 0.4}
BOX = {"miou": 0.55, "miou_click": None, "boundary_f": 0.2}


@pytest.fixture(scope="module")
def server() -> Iterator[ReferenceServer]:
    with ReferenceServer(reap=False, settings=Settings(auto_activate=True)) as running:
        yield running


@pytest.fixture(scope="module")
def worker(server: ReferenceServer) -> Talker:
    return Talker(server, job_type="sam2")


@pytest.fixture
def running(server: ReferenceServer, worker: Talker) -> tuple[str, str]:
    """A job that was queued as a person does, and its lease token."""
    fields = {"job_type": "sam2", "dataset_url": "s3://datasets/x.zip", "base_model": "scratch", "epochs": 2}
    answer = requests.post(
        f"{server.url}/api/v1/cv/train", json=fields, headers=headers(server.admin_token), timeout=20
    )
    job_id = str(answer.json()["job_id"])
    assert server.job(job_id)["config"]["base_model"] == "scratch"
    return job_id, worker.take(job_id)


def _page(server: ReferenceServer, job_id: str) -> str:
    answer = requests.get(
        f"{server.url}/job", params={"job_id": job_id}, auth=("any", server.admin_token), timeout=20
    )
    assert answer.status_code == 200, answer.text
    assert "<script" not in answer.text
    return answer.text


def _deliver(
    server: ReferenceServer, worker: Talker, job_id: str, token: str, **metrics: Any
) -> dict[str, Any]:
    """Upload a model and finish with it; returns its row."""
    version, data = f"{uuid.uuid4().hex[:8]}-a1", uuid.uuid4().bytes
    form = {
        "model_name": "sam2",
        "version": version,
        "training_job_id": server.job(job_id)["id"],
        "lease_token": token,
    }
    files = {"model_file": ("best.pt", io.BytesIO(data))}
    answer = worker.http.post(worker.url("upload-model"), data=form, files=files, timeout=30)
    assert answer.status_code == 201, answer.text
    result = {
        "model_name": "sam2",
        "version": version,
        "sha256_hash": answer.json()["data"]["sha256_hash"],
        "metrics": {
            "task": "segment",
            "classes": ["a"],
            "leaks": 0,
            "fitness": metrics.get("miou"),
            **metrics,
        },
    }
    assert worker.finish(job_id, token, "completed", result=result).status_code == 200
    (model,) = (model for model in server.models() if model["version"] == version)
    return model


def test_one_that_asks_for_several_gpus_is_offered_to_be_refused(
    server: ReferenceServer, worker: Talker
) -> None:
    job_id = worker.queue({"gpus": 4})
    assert [job["job_id"] for job in worker.poll(gpus_free=1, gpus=1)] == [job_id]
    assert server.job(job_id)["waits_for"] is None
    server.cancel(job_id)


def test_before_anything_is_measured_there_are_no_scores(
    server: ReferenceServer, worker: Talker, running: tuple[str, str]
) -> None:
    job_id, token = running
    assert server.job(job_id)["mask_scores"] is None
    worker.progress(job_id, token, 1, phase="verify")
    assert server.job(job_id)["mask_scores"] is None
    assert "Masks on val" not in _page(server, job_id)


def test_progress_shows_the_epoch_beside_the_base_model(
    server: ReferenceServer, worker: Talker, running: tuple[str, str]
) -> None:
    job_id, token = running
    metrics = {
        "miou": 0.7,
        "miou_click": 10**400,
        "boundary_f": HOSTILE,
        **{f"base/{key}": value for key, value in BASE.items()},
        "box_as_mask/miou": 0.55,
    }
    worker.progress(job_id, token, 1, phase="train", epoch=1, epochs=2, metrics=metrics)
    shown = server.job(job_id)["mask_scores"]
    assert (shown["improved"], shown["verdict"]) == (None, None)
    assert shown["scores"][0] == {
        "measure": "mIoU with boxes",
        "model": 0.7,
        "base": 0.61234,
        "box_as_mask": 0.55,
        "active": None,
    }
    assert [score["model"] for score in shown["scores"][1:]] == [None, None]
    text = _page(server, job_id)
    assert "<td>mIoU with boxes</td><td>0.700</td><td>0.612</td><td></td><td>0.550</td>" in text
    assert "this epoch" in text


def test_the_result_says_whether_it_helped(
    server: ReferenceServer, worker: Talker, running: tuple[str, str]
) -> None:
    job_id, token = running
    measured = {"miou": 0.6, "base": BASE, "box_as_mask": BOX, "active": {"miou": 0.65}}
    _deliver(server, worker, job_id, token, **measured, improved=False, verdict=f"NOT better {HOSTILE}")
    shown = server.job(job_id)["mask_scores"]
    assert (shown["improved"], shown["scores"][0]["active"]) == (False, 0.65)
    text = _page(server, job_id)
    assert '<p class="failed">NOT better &lt;script&gt;' in text
    assert "<td>0.600</td><td>0.612</td><td>0.650</td><td>0.550</td>" in text


def test_a_sam2_becomes_active_by_an_admins_word_alone_and_no_machine_gets_it(
    server: ReferenceServer, worker: Talker
) -> None:
    active = None
    for _ in range(2):
        job_id = worker.queue({"dataset_url": "s3://datasets/x.zip"})
        measured = {"miou": 0.9, "improved": True, "verdict": "better", "active": active}
        model = _deliver(server, worker, job_id, worker.take(job_id), **measured)
        assert server.job(job_id)["activation"]["reason"] == "SAM2 is never activated automatically"
        assert (model["usable"], model["is_active"]) == (True, False)
        server.activate(model["id"])
        # All that lets a better YOLO11 become active by itself.
        active = {"fitness": 0.1, "task": "segment", "classes": ["a"], "sha256": model["sha256_hash"]}
    assert worker.http.get(worker.url("download-model/active"), timeout=20).status_code == 404


def test_an_active_one_is_offered_to_be_measured_beside_and_makes_the_masks(
    server: ReferenceServer, worker: Talker, tmp_path: Path
) -> None:
    file = tmp_path / "any.pt"
    file.write_bytes(uuid.uuid4().bytes)
    server.add_model(file, model_name="sam2", version="bottles", active=True)
    file.write_bytes(uuid.uuid4().bytes)
    server.add_model(file, model_name="yolo11", version="detector", active=True)
    worker.queue({"dataset_url": "s3://datasets/x.zip"})
    (offer,) = worker.poll()
    (active,) = (model for model in server.models() if model["version"] == "bottles")
    assert offer["config"]["active_model_sha256"] == active["sha256_hash"]
    job_id = server.request_inference(image_url="s3://datasets/x.jpg", segmentation=True)
    config = server.job(job_id)["config"]
    assert (config["segmenter"], config["segmenter_active"]) == ("bottles", True)
