"""However a job ends, its end is told, nothing is left behind, and the next job runs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rvmcv_worker.reference.server import ReferenceServer
from tests.worker_process import WorkerProcess, eventually, still_alive


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


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        ("fail", "failed", "dataset_invalid"),
        ("segfault", "queued", "job_crashed"),
        ("no_result", "queued", "job_crashed"),
        ("link_result", "queued", "job_crashed"),
        ("garbage_progress", "queued", "job_crashed"),
    ],
)
def test_a_bad_end_has_its_code_and_the_next_job_runs(
    server: ReferenceServer, worker: WorkerProcess, ending: str, status: str, code: str
) -> None:
    bad = server.queue_training({"steps": 1, "then": ending}, job_type="stub")
    job = server.wait_for_job(bad, lambda job: bool(job["attempts"] and job["attempts"][0]["error"]), 30)
    assert job["attempts"][0]["ended_as"] == status
    assert job["attempts"][0]["error"]["code"] == code
    server.cancel(bad)
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
def test_a_job_whose_id_is_no_name_is_failed_without_a_workspace(
    server: ReferenceServer, worker: WorkerProcess, job_id: str
) -> None:
    server.queue_training({"steps": 1}, job_type="stub", job_id=job_id)
    job = server.wait_until_final(job_id, 30)
    assert job["error"]["code"] == "invalid_job"
    _nothing_is_left(worker)
    _the_next_job_runs(server)


@pytest.mark.parametrize("ending", ["complete", "ignore_sigterm", "setsid_grandchild"])
def test_a_cancel_ends_the_whole_tree(server: ReferenceServer, worker: WorkerProcess, ending: str) -> None:
    steps = 10_000 if ending == "complete" else 1
    job_id = server.queue_training({"steps": steps, "step_s": 0.05, "then": ending}, job_type="stub")
    _processing(server, job_id)
    family = worker.tree()
    assert family
    server.cancel(job_id)
    assert server.wait_until_final(job_id, 30)["status"] == "cancelled"
    assert still_alive(family) == []
    _nothing_is_left(worker)


def test_sigterm_hands_the_job_back_and_the_next_start_runs_it(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = server.queue_training({"steps": 60, "step_s": 0.05}, job_type="stub")
    _processing(server, job_id)
    family = worker.tree()
    assert worker.stop() == 0
    job = server.job(job_id)
    assert (job["status"], job["attempts"][0]["error"]["code"]) == ("queued", "worker_stopped")
    assert not job["attempts"][0]["counts"]
    assert still_alive(family) == []
    assert worker.workspace_files() == []
    worker.start()
    job = server.wait_until_final(job_id, 30)
    assert (job["status"], job["attempt"]) == ("completed", 2)


def test_after_sigkill_the_next_start_sweeps_hands_back_and_runs_the_job_again(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = server.queue_training({"steps": 60, "step_s": 0.05}, job_type="stub")
    _processing(server, job_id)
    family = worker.tree()
    worker.kill()
    psutil.wait_procs(family, timeout=10)
    assert still_alive(family) == []
    assert worker.workspace_files()
    worker.start()
    job = server.wait_until_final(job_id, 30)
    assert (job["status"], job["attempt"]) == ("completed", 2)
    _nothing_is_left(worker)


def test_fifty_jobs_run_in_order_none_lost_none_twice(server: ReferenceServer, worker: WorkerProcess) -> None:
    queued = [server.queue_training({"steps": 1, "step_s": 0}, job_type="stub") for _ in range(50)]
    server.wait_until_final(queued[-1], 120)
    jobs = [server.job(job_id) for job_id in queued]
    assert {job["status"] for job in jobs} == {"completed"}
    assert [len(job["attempts"]) for job in jobs] == [1] * 50
    started = [job["started_at"] for job in jobs]
    assert started == sorted(started)
    _nothing_is_left(worker)


def test_a_result_survives_a_server_that_is_away_at_the_end(tmp_path: Path) -> None:
    with ReferenceServer(tmp_path / "server") as server:
        port, s3_port = (int(url.rsplit(":", 1)[1]) for url in (server.url, server.s3_endpoint))
        worker = WorkerProcess(tmp_path / "worker", server, scale=0.01)
        worker.start()
        job_id = server.queue_training({"steps": 40, "step_s": 0.05}, job_type="stub")
        _processing(server, job_id)
    with contextlib.closing(worker):
        eventually(lambda: "upload waits" in worker.log())
        with ReferenceServer(tmp_path / "server", port=port, s3_port=s3_port) as server:
            job = server.wait_until_final(job_id, 60)
        assert (job["status"], job["attempt"]) == ("completed", 1)
        assert worker.workspace_files() == []


def test_a_signal_that_is_not_for_it_leaves_the_job_alone(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = server.queue_training({"steps": 30, "step_s": 0.05}, job_type="stub")
    _processing(server, job_id)
    worker.send(signal.SIGHUP)
    job = server.wait_until_final(job_id, 30)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    assert "the token was read again" in worker.log()
