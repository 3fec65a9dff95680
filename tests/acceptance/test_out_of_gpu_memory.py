"""Real trainings whose GPU memory runs out: each place goes on with less, and says with how much.

The daemon's children are started with a few lines before their own that make torch's error come up where a
GPU would raise it; what they wrap is Ultralytics, what is tested is untouched.
"""

from __future__ import annotations

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

#: Run in a child before its own main: the job's seed names the place, and what is more than fits.
CHILD = """
import sys
from rvmcv_worker.compute import ultralytics_env, yolo11_train

def oom():
    import torch
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB (a test)")

def install(seed):
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
    preprocess, step, look = DetectionTrainer.preprocess_batch, BaseTrainer.optimizer_step, DetectionValidator.preprocess
    def train_batch(self, batch):
        if seed == 1 and self.batch_size > 2 or seed == 2 and self.epoch >= 1 and self.batch_size > 2:
            oom()
        if seed == 6 and self.args.imgsz > 96 or seed == 7:
            oom()
        return preprocess(self, batch)
    def optimizer_step(self):
        if seed == 3 and self.epoch >= 1 and self.batch_size > 4:
            oom()
        step(self)
    def val_batch(self, batch):
        if len(batch["img"]) > 4 and (seed == 4 and self.training or seed == 5 and not self.training):
            oom()
        return look(self, batch)
    DetectionTrainer.preprocess_batch = train_batch
    BaseTrainer.optimizer_step = optimizer_step
    DetectionValidator.preprocess = val_batch

run = yolo11_train.run
def wrapped(job, child):
    ready = ultralytics_env.require_safe_load
    def then():
        ready()
        install(job["options"]["seed"])
    ultralytics_env.require_safe_load = then
    return run(job, child)
yolo11_train.run = wrapped
from rvmcv_worker.compute.child import main
sys.exit(main())
"""

#: The daemon, told to start its children so.
DAEMON = f"""
from rvmcv_worker import cli, executor
executor.run_child.__kwdefaults__["command"] = (*executor.PYTHON, "-c", {CHILD!r})
cli.main()
"""


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer) -> ReferenceServer:
    return shared_server


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> str:
    file = draw_zip(tmp_path_factory.mktemp("drawn") / "drawn.zip", train=16, val=8, size_px=96, seed=1)
    return server.put_object("datasets", "drawn.zip", file)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> Iterator[WorkerProcess]:
    directory = tmp_path_factory.mktemp("worker")
    with WorkerProcess(
        directory, server, job_types=("yolo11",), scale=0.02, program=("-c", DAEMON)
    ) as running:
        yield running


def _train(server: ReferenceServer, data_set: str, seed: int, **config: Any) -> dict[str, Any]:
    wanted = {**SMALL, "dataset_url": data_set, "seed": seed, **config}
    return server.wait_until_final(server.queue_training(wanted), 120)


@pytest.mark.parametrize(
    ("place", "seed", "batch_sizes", "children"),
    [
        ("the first epoch, within one child", 1, [2], 1),
        ("a later epoch", 2, [8, 2], 2),
        ("the optimizer's step", 3, [8, 4], 2),
        ("validation", 4, [2], 3),
        ("the final evaluation", 5, [8], 3),
    ],
)
def test_it_goes_on_with_a_smaller_batch(
    server: ReferenceServer,
    worker: WorkerProcess,
    data_set: str,
    place: str,
    seed: int,
    batch_sizes: list[int],
    children: int,
) -> None:
    before = worker.log().count("out of GPU memory: going on")
    job = _train(server, data_set, seed)
    assert (job["status"], job["attempt"]) == ("completed", 1), job["error"]
    result = job["result"]
    assert [run["batch_size"] for run in result["attempts"]] == batch_sizes
    assert sum(run["epochs"] for run in result["attempts"]) == 2
    assert result["effective"]["batch"] == (2 if seed in {1, 2, 4, 5} else 4)
    assert job["progress"]["batch_size"] == result["effective"]["batch"]
    assert [entry["epoch"] for entry in job["history"]] == [1, 2]
    assert worker.log().count("out of GPU memory: going on") - before == children - 1
    assert 0 <= result["metrics"]["mAP50"] <= 1


def test_below_a_batch_of_one_it_goes_on_with_smaller_images_where_it_may(
    server: ReferenceServer, worker: WorkerProcess, data_set: str
) -> None:
    job = _train(server, data_set, 6, batch_size=1, img_size=128, epochs=1, allow_smaller_img_size=True)
    assert job["status"] == "completed", job["error"]
    assert job["result"]["attempts"] == [{"attempt": 1, "epochs": 1, "batch_size": 1, "img_size": 96}]
    assert job["result"]["effective"]["imgsz"] == 96


def test_what_does_not_even_fit_alone_is_out_of_gpu_memory(
    server: ReferenceServer, worker: WorkerProcess, data_set: str
) -> None:
    job = _train(server, data_set, 7, batch_size=1, epochs=1)
    assert (job["status"], job["error"]["code"]) == ("failed", "out_of_gpu_memory")
    assert "does not hold batch 1 at 64 px" in job["error"]["message"]
    assert worker.workspace_files() == []
