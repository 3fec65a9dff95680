"""The daemon as ops and RVM-Server see it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest

from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.reference.server import ReferenceServer
from tests.worker_process import WorkerProcess, eventually

#: Times of the wire are cut to the millisecond.
_A_MOMENT = timedelta(milliseconds=1)


@pytest.fixture
def worker(tmp_path: Path, server: ReferenceServer) -> Iterator[WorkerProcess]:
    with WorkerProcess(tmp_path / "worker", server) as running:
        eventually(lambda: server.workers() and server.workers()[0]["status"])
        yield running


def _status(server: ReferenceServer) -> dict[str, Any]:
    status: dict[str, Any] = server.workers()[0]["status"]
    return status


def _cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rvmcv_worker.cli", *arguments], capture_output=True, text=True, check=False
    )


def test_row_32_it_listens_nowhere(worker: WorkerProcess) -> None:
    process = psutil.Process(worker.pid)
    assert [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN or not c.raddr] == []


def test_the_server_sees_how_it_is(server: ReferenceServer, worker: WorkerProcess) -> None:
    eventually(lambda: _status(server)["state"] == "ready")
    status = _status(server)
    assert status["claims"] == {"train": True, "infer": False, "batch": False}
    assert status["sandbox"] in {"bubblewrap", "none"}
    assert status["host"]["memory_total_mb"] > 0
    job_id = server.queue_training({"steps": 1000, "step_s": 0.05}, job_type="stub")
    eventually(lambda: _status(server)["state"] == "busy")
    server.cancel(job_id)
    server.wait_until_final(job_id, 30)
    eventually(lambda: _status(server)["jobs"]["cancelled"] == 1)


def test_a_pause_lets_jobs_finish_and_claims_none(server: ReferenceServer, worker: WorkerProcess) -> None:
    running = server.queue_training({"steps": 40, "step_s": 0.05}, job_type="stub")
    server.wait_for_job(running, lambda job: job["status"] == "processing", 20)
    server.set_desired_state("vm102", "pause")
    eventually(lambda: _status(server)["state"] == "paused")
    waiting = server.queue_training({"steps": 1}, job_type="stub")
    assert server.wait_until_final(running, 30)["status"] == "completed"
    assert server.job(waiting)["status"] == "queued"
    server.set_desired_state("vm102", "run")
    assert server.wait_until_final(waiting, 30)["status"] == "completed"


def test_a_drain_hands_back_what_runs(server: ReferenceServer, worker: WorkerProcess) -> None:
    job_id = server.queue_training({"steps": 1000, "step_s": 0.05}, job_type="stub")
    server.wait_for_job(job_id, lambda job: job["status"] == "processing", 20)
    server.set_desired_state("vm102", "drain")
    job = server.wait_for_job(job_id, lambda job: job["status"] == "queued", 20)
    assert job["attempts"][0]["error"]["code"] == "worker_stopped"
    eventually(lambda: _status(server)["state"] == "draining")
    assert worker.tree() == []


def test_row_02_a_rejected_token_stops_claims_until_a_new_one_is_read(
    tmp_path: Path, server: ReferenceServer
) -> None:
    with WorkerProcess(tmp_path / "worker", server, token="wrong-canary", scale=0.02) as worker:
        eventually(lambda: "rejects the worker's token" in worker.log())
        job_id = server.queue_training({"steps": 1}, job_type="stub")
        rejected = worker.log().count("401")
        eventually(lambda: worker.log().count("401") > rejected)
        renewed_at = datetime.now(timezone.utc)
        worker.token_file.write_text(server.worker_token)
        job = server.wait_until_final(job_id, 30)
        assert job["status"] == "completed"
        assert datetime.fromisoformat(job["started_at"].replace("Z", "+00:00")) >= renewed_at - _A_MOMENT
        for secret in ("wrong-canary", server.worker_token, server.s3_secret_key):
            assert secret not in worker.log()


def test_row_31_a_missing_token_or_a_wrong_config_is_told_and_not_retried(
    tmp_path: Path, server: ReferenceServer
) -> None:
    worker = WorkerProcess(tmp_path / "worker", server)
    worker.token_file.unlink()
    ended = _cli("run", "--config", str(worker.config_file))
    assert ended.returncode == ExitCode.CONFIG
    assert str(worker.token_file) in ended.stderr
    worker.config_file.write_text("[server]\nurrl = 'x'")
    ended = _cli("run", "--config", str(worker.config_file))
    assert ended.returncode == ExitCode.CONFIG
    assert "unknown key 'server.urrl'; did you mean 'url'?" in ended.stderr


def test_doctor_says_what_is_wrong_and_what_to_do(tmp_path: Path, server: ReferenceServer) -> None:
    worker = WorkerProcess(tmp_path / "worker", server, job_types=("stub", "yolo11"))
    well = _cli("doctor", "--config", str(worker.config_file))
    assert well.returncode == ExitCode.OK, well.stdout
    for subject in ("server", "token", "protocol", "storage", "disk", "compute"):
        assert any(line.split()[:2] == ["ok", subject] for line in well.stdout.splitlines()), well.stdout
    worker.token_file.write_text("wrong")
    ill = _cli("doctor", "--config", str(worker.config_file))
    assert ill.returncode == ExitCode.FAILED
    assert "FAILED token" in " ".join(ill.stdout.split())
    away = WorkerProcess(tmp_path / "away", server, url="http://127.0.0.1:9")
    ill = _cli("doctor", "--config", str(away.config_file))
    assert ill.returncode == ExitCode.FAILED
    assert "check [server] url" in ill.stdout


def test_doctor_beside_a_running_daemon_disturbs_nothing(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = server.queue_training({"steps": 40, "step_s": 0.05}, job_type="stub")
    server.wait_for_job(job_id, lambda job: job["status"] == "processing", 20)
    _cli("doctor", "--config", str(worker.config_file))
    job = server.wait_until_final(job_id, 30)
    assert (job["status"], job["attempt"]) == ("completed", 1)


def test_without_the_wall_that_is_required_nothing_is_claimed(
    tmp_path: Path, server: ReferenceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no bwrap to be found
    with WorkerProcess(tmp_path / "worker", server, sandbox="required") as worker:
        job_id = server.queue_training({"steps": 1}, job_type="stub")
        eventually(lambda: server.workers() and server.workers()[0]["status"])
        assert _status(server)["state"] == "degraded"
        assert "no wall, no claims" in _status(server)["reasons"][0]
        assert _status(server)["claims"]["train"] is False
        assert server.job(job_id)["status"] == "queued"
        assert "apt install bubblewrap" in worker.log()


def test_a_daemon_whose_id_another_has_taken_says_so(tmp_path: Path, server: ReferenceServer) -> None:
    with WorkerProcess(tmp_path / "first", server) as first:
        eventually(lambda: server.workers() and server.workers()[0]["status"])
        with WorkerProcess(tmp_path / "second", server):
            eventually(lambda: "another daemon of this worker's id has spoken" in first.log())
        shown = _cli("status", "--json", "--config", str(first.config_file))
        status = json.loads(shown.stdout)
        assert status["state"] == "degraded"
        assert not any(status["claims"].values())
        assert "give it an id of its own" in status["reasons"][0]
