"""A job survives its attempt: it goes on where it left off, here or on another worker, however that ended."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings, Timing
from tests.reference_talker import Talker
from tests.worker_process import WorkerProcess, eventually, still_alive

pytestmark = pytest.mark.slow

STEPS = 40
LONG = {"steps": STEPS, "step_s": 0.05}
#: Scaled to 0.3 s.
OFTEN = {"worker": {"checkpoint_every_min": 0.5}}


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer) -> ReferenceServer:
    return shared_server


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> Iterator[WorkerProcess]:
    directory = tmp_path_factory.mktemp("worker")
    with WorkerProcess(directory, server, scale=0.01, extra=OFTEN) as running:
        yield running


def _stub(server: ReferenceServer, **config: Any) -> str:
    return server.queue_training({**LONG, **config}, job_type="stub")


def _wait_for_step(server: ReferenceServer, job_id: str, step: int) -> None:
    server.wait_for_job(job_id, lambda job: len(job["history"]) >= step, 20)


def _went_on(server: ReferenceServer, job_id: str, *, steps: int = STEPS, attempts: int = 2) -> list[int]:
    """The job completes, and every step was done by one attempt only; returns how many by each."""
    job = server.wait_until_final(job_id, 30)
    assert (job["status"], job["attempt"]) == ("completed", attempts), job["error"]
    runs = job["result"]["stub"]["attempts"]
    assert sum(run["epochs"] for run in runs) == steps
    assert [entry["epoch"] for entry in job["history"]] == list(range(1, steps + 1))
    return [run["epochs"] for run in runs]


def _stored(server: ReferenceServer, job: dict[str, Any]) -> int:
    """The job's checkpoint is the object that it names; returns its step."""
    checkpoint = job["checkpoint"]
    content = server.read_object(checkpoint["path"])
    assert hashlib.sha256(content).hexdigest() == checkpoint["sha256"]
    assert f"/{job['job_id']}/attempt-" in checkpoint["path"]
    return int(checkpoint["epoch"])


def test_sigterm_takes_the_newest_step_along(server: ReferenceServer, worker: WorkerProcess) -> None:
    job_id = _stub(server, checkpoint_steps=1000)
    _wait_for_step(server, job_id, 5)
    assert worker.stop() == 0
    job = server.job(job_id)
    assert (job["status"], job["attempts"][0]["error"]["code"]) == ("queued", "worker_stopped")
    reached = _stored(server, job)
    assert reached >= max(5, len(job["history"]))
    assert worker.workspace_files() == []
    worker.start()
    assert _went_on(server, job_id) == [reached, STEPS - reached]
    assert f"going on from the checkpoint of epoch {reached}" in worker.log()


def test_after_sigkill_the_next_start_saves_the_newest_checkpoint(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    worker.stop()
    worker.start()  # so that no periodic checkpoint of an earlier test is under way
    job_id = _stub(server, checkpoint_steps=1)
    _wait_for_step(server, job_id, 5)
    family = worker.tree()
    worker.kill()
    psutil.wait_procs(family, timeout=10)
    assert still_alive(family) == []
    files = [path.name for path in worker.workspace_files() if path.name.startswith("checkpoint-")]
    newest = max(int(name.removeprefix("checkpoint-").removesuffix(".tar")) for name in files)
    worker.start()
    job = server.wait_for_job(job_id, lambda job: job["attempts"][0]["ended_as"] is not None, 20)
    assert job["attempts"][0]["error"]["code"] == "worker_died"
    assert _stored(server, job) == newest >= 5
    assert job["checkpoint"]["path"].endswith("/attempt-1/checkpoint-last.tar")
    assert _went_on(server, job_id) == [newest, STEPS - newest]
    assert worker.workspace_files() == []


def test_while_a_job_runs_its_checkpoints_go_to_storage_in_turn(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = _stub(server, checkpoint_steps=2)
    seen: dict[str, int] = {}

    def both(job: dict[str, Any]) -> bool:
        if job["checkpoint"]:
            seen[job["checkpoint"]["path"].rsplit("/", 1)[1]] = _stored(server, job)
        return len(seen) == 2

    server.wait_for_job(job_id, both, 20)
    assert set(seen) == {"checkpoint-0.tar", "checkpoint-1.tar"}
    assert _went_on(server, job_id, attempts=1) == [STEPS]


def test_a_job_that_crashed_goes_on_and_one_that_had_ended_is_only_published(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = server.queue_training(
        {"steps": 4, "checkpoint_steps": 1, "then": "segfault", "then_in": 1}, job_type="stub"
    )
    assert _went_on(server, job_id, steps=4) == [4]
    job = server.job(job_id)
    assert job["attempts"][0]["error"]["code"] == "job_crashed"
    assert set(job["result"]["artifacts"]) == {"model.bin"}


@pytest.mark.parametrize("damage", ["other bytes", "not there", "no checkpoint"])
def test_a_checkpoint_that_cannot_be_used_starts_the_job_from_the_beginning(
    server: ReferenceServer, worker: WorkerProcess, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"no tar at all")
    path = server.put_object("models", "cv/x/attempt-1/checkpoint-0.tar", file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest() if damage == "no checkpoint" else "0" * 64
    if damage == "not there":
        path = "s3://models/cv/none.tar"
    worker.stop()
    other = Talker(server, job_type="stub")
    job_id = other.queue({"steps": 3, "checkpoint_steps": 1})
    token = other.take(job_id)
    other.progress(job_id, token, 1, checkpoint={"path": path, "sha256": sha256, "epoch": 2})
    other.hand_back(job_id, token, "worker_stopped")
    said_before = len(worker.log())
    worker.start()
    assert _went_on(server, job_id, steps=3) == [3]
    if damage != "no checkpoint":  # which only the child can tell, in its own log
        assert "the job starts from the beginning" in worker.log()[said_before:]


def test_a_child_names_no_object_of_others(server: ReferenceServer, worker: WorkerProcess) -> None:
    job_id = server.queue_training({"steps": 1, "then": "foreign_checkpoint"}, job_type="stub")
    assert server.wait_until_final(job_id, 30)["checkpoint"] is None


def test_a_link_in_a_checkpoints_place_is_not_followed(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    config = {"steps": 2, "then": "link_checkpoint", "then_in": 1, "target": str(worker.token_file)}
    job = server.wait_until_final(server.queue_training(config, job_type="stub"), 30)
    assert (job["status"], job["attempt"], job["checkpoint"]) == ("completed", 2, None)
    assert "checkpoint-999.tar is not a regular file of the job's own: a link" in worker.log()


def test_a_drain_sends_the_job_to_another_worker_and_neither_has_keys(tmp_path: Path) -> None:
    settings = Settings(timing=Timing(report_interval_s=1.0, hand_back_delay_s=0.1))
    with ReferenceServer(tmp_path / "server", settings=settings) as server:
        first, second = (
            WorkerProcess(tmp_path / name, server, scale=0.01, s3_keys=False, worker_id=name)
            for name in ("vm102", "vm103")
        )
        with first:
            job_id = _stub(server, checkpoint_steps=1000)
            _wait_for_step(server, job_id, 5)
            server.set_desired_state("vm102", "drain")
            job = server.wait_for_job(job_id, lambda job: job["status"] == "queued", 20)
            reached = _stored(server, job)
            assert job["checkpoint"]["path"].startswith("s3://artifacts/")
            with second:
                assert _went_on(server, job_id) == [reached, STEPS - reached]
            assert server.job(job_id)["attempts"][1]["worker_id"] == "vm103"


@pytest.mark.parametrize("killed", [False, True])
def test_a_worker_that_ends_while_server_and_storage_are_away_loses_nothing(
    tmp_path: Path, killed: bool
) -> None:
    timing = Timing(report_interval_s=0.2, hand_back_delay_s=0.1)
    with ReferenceServer(tmp_path / "server", settings=Settings(timing=timing)) as server:
        port, s3_port = (int(url.rsplit(":", 1)[1]) for url in (server.url, server.s3_endpoint))
        worker = WorkerProcess(tmp_path / "worker", server, scale=0.01)
        worker.start()
        job_id = _stub(server, checkpoint_steps=1)
        _wait_for_step(server, job_id, 5)
    if killed:
        worker.kill()
    else:
        assert worker.stop() == 0
        assert "the next start hands the job back with it" in worker.log()
    assert worker.workspace_files()
    worker.start()
    eventually(lambda: "waits for storage" in worker.log())  # the worker is there before the server is
    with (
        contextlib.closing(worker),
        ReferenceServer(
            tmp_path / "server", port=port, s3_port=s3_port, settings=Settings(timing=timing)
        ) as server,
    ):
        first, _ = _went_on(server, job_id)
        assert first >= 5
        error = server.job(job_id)["attempts"][0]["error"]
        assert error["code"] == ("worker_died" if killed else "worker_stopped")
        assert worker.workspace_files() == []
