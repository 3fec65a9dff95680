"""However a job ends, its end is told, nothing is left behind, and the next job runs."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from rvmcv_worker.reference.server import ReferenceServer
from tests.worker_process import WorkerProcess


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer) -> ReferenceServer:
    return shared_server


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> Iterator[WorkerProcess]:
    """One daemon for the whole module, so that each test also shows that the next job runs."""
    with WorkerProcess(
        tmp_path_factory.mktemp("worker"), server, job_types=("stub", "yolo11"), scale=0.01
    ) as running:
        yield running


def _processing(server: ReferenceServer, job_id: str) -> None:
    server.wait_for_job(job_id, lambda job: job["phase"] == "train" and bool(job["fraction"]), 20)


def _nothing_is_left(worker: WorkerProcess) -> None:
    assert worker.workspace_files() == []
    assert worker.tree() == []


def _the_next_job_runs(server: ReferenceServer) -> None:
    job_id = server.queue_training({"steps": 1}, job_type="stub")
    assert server.wait_until_final(job_id, 30)["status"] == "completed"


def test_a_job_completes_and_every_epoch_is_told_once(server: ReferenceServer, worker: WorkerProcess) -> None:
    job_id = server.queue_training({"steps": 7, "step_s": 0.02}, job_type="stub")
    job = server.wait_until_final(job_id, 30)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    assert [entry["epoch"] for entry in job["history"]] == [1, 2, 3, 4, 5, 6, 7]
    _nothing_is_left(worker)


def test_a_failed_job_has_its_code_and_the_next_job_runs(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job = server.wait_until_final(server.queue_training({"steps": 1, "then": "fail"}, job_type="stub"), 30)
    assert (job["status"], job["error"]["code"]) == ("failed", "dataset_invalid")
    _nothing_is_left(worker)
    _the_next_job_runs(server)


@pytest.mark.slow
def test_a_job_that_always_crashes_is_failed_as_poisoned(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = server.queue_training({"steps": 1, "then": "exit"}, job_type="stub")
    job = server.wait_until_final(job_id, 60)
    assert job["status"] == "failed"
    assert [attempt["error"]["code"] for attempt in job["attempts"]] == ["job_crashed"] * 3
    _nothing_is_left(worker)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"dataset_url": "s3://datasets/a.zip", "epoch": 3}, "did you mean 'epochs'?"),
        ({"dataset_url": "s3://datasets/a.zip", "epochs": -1}, "config.epochs"),
    ],
)
def test_an_invalid_config_is_failed_with_its_field(
    server: ReferenceServer, worker: WorkerProcess, config: dict[str, object], said: str
) -> None:
    job = server.wait_until_final(server.queue_training(config), 30)
    assert job["error"]["code"] == "invalid_job"
    assert said in job["error"]["message"]
    assert said in worker.log()
    _nothing_is_left(worker)


@pytest.mark.parametrize("job_id", ["../x", "a b", "x" * 4000])
def test_row_26_a_job_whose_id_is_no_name_is_failed_without_a_workspace(
    server: ReferenceServer, worker: WorkerProcess, job_id: str
) -> None:
    server.queue_training({"steps": 1}, job_type="stub", job_id=job_id)
    job = server.wait_until_final(job_id, 30)
    assert job["error"]["code"] == "invalid_job"
    _nothing_is_left(worker)
    _the_next_job_runs(server)


def test_row_34_fifty_jobs_run_in_order_none_lost_none_twice(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    queued = [server.queue_training({"steps": 1, "step_s": 0}, job_type="stub") for _ in range(50)]
    server.wait_until_final(queued[-1], 120)
    jobs = [server.job(job_id) for job_id in queued]
    assert {job["status"] for job in jobs} == {"completed"}
    assert [len(job["attempts"]) for job in jobs] == [1] * 50
    started = [job["started_at"] for job in jobs]
    assert started == sorted(started)
    _nothing_is_left(worker)


def test_a_signal_that_is_not_for_it_leaves_the_job_alone(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = server.queue_training({"steps": 30, "step_s": 0.05}, job_type="stub")
    _processing(server, job_id)
    worker.send(signal.SIGHUP)
    job = server.wait_until_final(job_id, 30)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    assert "the token was read again" in worker.log()
