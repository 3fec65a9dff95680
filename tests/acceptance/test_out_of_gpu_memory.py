"""Real trainings whose GPU memory runs out: from each place they go on with less, and say with how much."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker.demo.drawing import draw_zip
from rvmcv_worker.reference.server import ReferenceServer
from tests import short_of_gpu_memory
from tests.short_of_gpu_memory import (
    ALWAYS,
    FINAL_EVALUATION,
    FIRST_EPOCH,
    LARGE_IMAGES,
    LATER_EPOCH,
    OPTIMIZER_STEP,
    VALIDATION,
)
from tests.training_jobs import SMALL
from tests.worker_process import WorkerProcess

pytest.importorskip("torch", reason="the extra `compute` is not installed")
pytestmark = pytest.mark.slow

CHILD = Path(short_of_gpu_memory.__file__).read_text(encoding="utf-8")
#: The daemon, told to start that in the place of each child.
DAEMON = f"""
from rvmcv_worker import cli, executor
executor.run_child.__kwdefaults__["command"] = (*executor.PYTHON, "-c", {CHILD!r})
cli.main()
"""


#: What each place is tried with, beside its number as the seed. Without `nbs` no step falls into epoch 2.
CONFIGS: dict[int, dict[str, object]] = {
    FIRST_EPOCH: {},
    LATER_EPOCH: {},
    OPTIMIZER_STEP: {"nbs": 8},
    VALIDATION: {},
    FINAL_EVALUATION: {},
    LARGE_IMAGES: {"epochs": 1, "batch_size": 1, "img_size": 128, "allow_smaller_img_size": True},
    ALWAYS: {"epochs": 1, "batch_size": 1},
}


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, shared_server: ReferenceServer
) -> Iterator[WorkerProcess]:
    with WorkerProcess(
        tmp_path_factory.mktemp("worker"),
        shared_server,
        job_types=("yolo11",),
        scale=0.02,
        extra={"worker": {"train_slots": 2}},
        program=("-c", DAEMON),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def jobs(
    tmp_path_factory: pytest.TempPathFactory, shared_server: ReferenceServer, worker: WorkerProcess
) -> dict[int, dict[str, Any]]:
    """One finished training for each place, two at a time."""
    file = tmp_path_factory.mktemp("drawn") / "drawn.zip"
    url = shared_server.put_object(
        "datasets", "drawn.zip", draw_zip(file, train=16, val=16, test=0, size_px=96, seed=1)
    )
    queued = {
        place: shared_server.queue_training({**SMALL, "dataset_url": url, "seed": place, **config})
        for place, config in CONFIGS.items()
    }
    ended = {place: shared_server.wait_until_final(job_id, 240) for place, job_id in queued.items()}
    assert worker.workspace_files() == []
    return ended


@pytest.mark.parametrize(
    ("place", "batch_sizes", "effective", "children"),
    [
        pytest.param(FIRST_EPOCH, [2], 2, 1, id="first epoch, where Ultralytics halves it itself"),
        pytest.param(LATER_EPOCH, [8, 2], 2, 2, id="later epoch"),
        pytest.param(OPTIMIZER_STEP, [8, 4], 4, 2, id="optimizer step"),
        pytest.param(VALIDATION, [4], 4, 2, id="validation"),
        pytest.param(FINAL_EVALUATION, [8], 4, 2, id="final evaluation"),
    ],
)
def test_it_goes_on_with_a_smaller_batch(
    worker: WorkerProcess,
    jobs: dict[int, dict[str, Any]],
    place: int,
    batch_sizes: list[int],
    effective: int,
    children: int,
) -> None:
    job = jobs[place]
    assert (job["status"], job["attempt"]) == ("completed", 1), job["error"]
    result = job["result"]
    assert [run["batch_size"] for run in result["attempts"]] == batch_sizes
    assert sum(run["epochs"] for run in result["attempts"]) == 2
    assert result["effective"]["batch"] == job["progress"]["batch_size"] == effective
    assert [entry["epoch"] for entry in job["history"]] == [1, 2]
    assert worker.log().count(f"[{job['job_id']}] out of GPU memory: going on") == children - 1
    assert 0 <= result["metrics"]["mAP50"] <= 1


def test_below_a_batch_of_one_it_goes_on_with_smaller_images_where_it_may(
    jobs: dict[int, dict[str, Any]],
) -> None:
    job = jobs[LARGE_IMAGES]
    assert job["status"] == "completed", job["error"]
    assert job["result"]["attempts"] == [{"attempt": 1, "epochs": 1, "batch_size": 1, "img_size": 96}]
    assert job["result"]["effective"]["imgsz"] == 96


def test_what_does_not_even_fit_alone_is_out_of_gpu_memory(jobs: dict[int, dict[str, Any]]) -> None:
    job = jobs[ALWAYS]
    assert (job["status"], job["error"]["code"]) == ("failed", "out_of_gpu_memory")
    assert "does not hold batch 1 at 64 px" in job["error"]["message"]
