"""Drain, pause and resume: by the server, by commands, by signals; and what of it survives."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from rvmcv_worker.control_client import ControlClient, ControlError
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings, Timing
from tests.front import front
from tests.watched import Watched
from tests.worker_process import WorkerProcess, eventually, still_alive

LONG = {"steps": 10_000, "step_s": 0.05}


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer) -> ReferenceServer:
    return shared_server


@pytest.fixture(scope="module")
def module_worker(
    tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer
) -> Iterator[WorkerProcess]:
    with WorkerProcess(tmp_path_factory.mktemp("worker"), server, scale=0.05) as running:
        eventually(server.workers)
        yield running


@pytest.fixture
def worker(server: ReferenceServer, module_worker: WorkerProcess) -> Iterator[WorkerProcess]:
    """The module's daemon, without any wish before and after, and with nothing to do."""
    yield module_worker
    server.set_desired_state("vm102", "run")
    _cli(module_worker, "resume")
    for job in _status(module_worker)["running"]:
        server.cancel(job["job_id"])
        server.wait_until_final(job["job_id"], 30)


def _command(worker: WorkerProcess, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "rvmcv_worker.cli", *arguments, "--config", str(worker.config_file)]


def _cli(worker: WorkerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(worker, *arguments), capture_output=True, text=True, check=False)


def _begun(worker: WorkerProcess, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(_command(worker, *arguments), stdout=pipe, stderr=pipe, text=True)


def _status(worker: WorkerProcess) -> dict[str, Any]:
    return ControlClient(worker.config_file.parent / "run").status()


def _answers(worker: WorkerProcess) -> bool:
    with contextlib.suppress(ControlError):
        return bool(_status(worker))
    return False


def _queue(server: ReferenceServer, config: dict[str, Any]) -> str:
    return server.queue_training(config, job_type="stub")


def _processing(server: ReferenceServer, job_id: str) -> None:
    server.wait_for_job(job_id, lambda job: job["status"] == "processing" and bool(job["fraction"]), 20)


def _seen_by_server(server: ReferenceServer) -> dict[str, Any]:
    status: dict[str, Any] = server.workers()[0]["status"]
    return status


def test_drain_wait_returns_with_everything_handed_back_and_the_worker_up(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = _queue(server, LONG)
    _processing(server, job_id)
    family = worker.tree()
    drained = _cli(worker, "drain", "--wait", "--timeout", "30")
    assert drained.returncode == ExitCode.OK, drained.stderr
    job = server.job(job_id)  # at once: the report is delivered when the command returns
    assert (job["status"], job["attempts"][-1]["error"]["code"]) == ("queued", "worker_stopped")
    assert not job["attempts"][-1]["counts"]
    assert still_alive(family) == []
    assert worker.workspace_files() == []
    status = _status(worker)
    assert (status["state"], status["desired"]["operator"]) == ("draining", "drain")
    assert status["claims"] == {"train": False, "infer": False, "batch": False}
    eventually(lambda: _seen_by_server(server)["state"] == "draining")
    assert _cli(worker, "resume").stdout == "resumed\n"
    _processing(server, job_id)
    server.cancel(job_id)
    server.wait_until_final(job_id, 30)


def test_a_claim_on_its_way_when_a_drain_comes_is_handed_back(tmp_path: Path) -> None:
    claiming, drained = threading.Event(), threading.Event()

    def slow_claim(_path: str, body: bytes) -> bool:
        if b'"claim"' in body:
            claiming.set()
            drained.wait(20)
        return True

    with (
        ReferenceServer(tmp_path / "server") as server,
        front(server, slow_claim) as url,
        WorkerProcess(tmp_path / "worker", server, url=url) as worker,
    ):
        job_id = _queue(server, LONG)
        assert claiming.wait(20)
        with _begun(worker, "drain", "--wait") as drain:
            assert "drained" in drain.stdout.readline()
            assert "1 being claimed or settled" in drain.stdout.readline()
            drained.set()
            assert drain.wait(20) == ExitCode.OK
        job = server.job(job_id)
        assert job["status"] == "queued"
        assert [attempt["error"]["code"] for attempt in job["attempts"]] == ["worker_stopped"]


def test_pause_lets_jobs_end_and_nothing_is_claimed_after_it(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    running = _queue(server, {"steps": 30, "step_s": 0.05})
    _processing(server, running)
    assert _cli(worker, "pause").returncode == ExitCode.OK
    waiting = _queue(server, {"steps": 1})
    assert _cli(worker, "pause", "--wait", "--timeout", "30").returncode == ExitCode.OK
    assert server.job(running)["status"] == "completed"
    assert server.job(waiting)["attempts"] == []
    _cli(worker, "resume")
    assert server.wait_until_final(waiting, 30)["status"] == "completed"


def test_a_wait_that_lasts_too_long_ends_with_its_own_code_and_the_wish_holds(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = _queue(server, LONG)
    _processing(server, job_id)
    waited = _cli(worker, "pause", "--wait", "--timeout", "0.5")
    assert waited.returncode == ExitCode.TIMED_OUT
    assert "not within 0.5 s; the wish still holds: pause" in waited.stderr
    assert "1 running" in waited.stdout
    assert _status(worker)["desired"]["operator"] == "pause"


def test_a_wait_ends_when_somebody_takes_the_wish_back(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = _queue(server, LONG)
    _processing(server, job_id)
    with _begun(worker, "pause", "--wait") as waiting:
        assert "paused" in waiting.stdout.readline()
        assert "1 running" in waiting.stdout.readline()
        _cli(worker, "resume")
        assert waiting.wait(20) == ExitCode.FAILED
        assert "the operator's wish is now run" in waiting.stderr.read()


def test_the_stricter_wish_holds_and_resume_takes_only_ones_own_back(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    _cli(worker, "pause")
    server.set_desired_state("vm102", "drain")
    eventually(lambda: _status(worker)["state"] == "draining")
    resumed = _cli(worker, "resume")
    assert resumed.stdout == "taken back; RVM-Server still wishes: drain\n"
    assert _status(worker)["desired"] == {"server": "drain", "operator": "run", "holds": "drain"}
    server.set_desired_state("vm102", "run")
    eventually(lambda: _status(worker)["state"] == "ready")


@pytest.mark.slow
def test_leases_live_on_meanwhile(tmp_path: Path) -> None:
    timing = Timing(lease_train_s=1.0, reap_every_s=0.1, report_interval_s=1.0, hand_back_delay_s=0.1)
    with (
        ReferenceServer(tmp_path / "server", settings=Settings(timing=timing)) as server,
        WorkerProcess(tmp_path / "worker", server, extra={"limits": {"term_grace_s": 3.0}}) as worker,
    ):
        job_id = _queue(server, {"steps": 60, "step_s": 0.05, "then": "ignore_sigterm"})
        _processing(server, job_id)
        _cli(worker, "pause")
        job = server.wait_for_job(job_id, lambda job: len(job["history"]) == 60, 30)  # three leases later
        assert (job["status"], job["attempt"]) == ("processing", 1)
        # Its child takes three leases more to die.
        assert _cli(worker, "drain", "--wait", "--timeout", "30").returncode == ExitCode.OK
        job = server.job(job_id)
        assert [attempt["error"]["code"] for attempt in job["attempts"]] == ["worker_stopped"]


def test_signals_pause_resume_and_drain(server: ReferenceServer, worker: WorkerProcess) -> None:
    job_id = _queue(server, LONG)
    _processing(server, job_id)
    worker.send(signal.SIGUSR1)
    eventually(lambda: _status(worker)["desired"]["operator"] == "pause")
    assert _status(worker)["running"]
    worker.send(signal.SIGUSR1)
    eventually(lambda: _status(worker)["desired"]["operator"] == "run")
    worker.send(signal.SIGUSR2)
    server.wait_for_job(job_id, lambda job: job["status"] == "queued", 20)
    assert _status(worker)["desired"]["operator"] == "drain"
    worker.send(signal.SIGUSR1)
    _processing(server, job_id)
    server.cancel(job_id)
    server.wait_until_final(job_id, 30)


def test_the_operators_wish_survives_a_stop_and_a_kill(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    for command, end in (("pause", worker.stop), ("drain", worker.kill)):
        _cli(worker, command)
        end()
        assert _cli(worker, "status").returncode == ExitCode.NOT_RUNNING
        waiting = _queue(server, {"steps": 1})
        worker.start()
        eventually(lambda: _answers(worker))
        eventually(lambda: _seen_by_server(server)["state"] in {"paused", "draining"})
        assert _status(worker)["desired"]["operator"] == command
        assert server.job(waiting)["attempts"] == []
        assert "as before the restart, by the operator's wish" in worker.log()
        _cli(worker, "resume")
        assert server.wait_until_final(waiting, 30)["status"] == "completed"


def test_a_wish_of_the_servers_is_known_before_the_first_claim(tmp_path: Path) -> None:
    polled = threading.Event()
    polled.set()  # the first start is not held up

    def late_status(path: str, _body: bytes) -> bool:
        if path.endswith("/job-status"):
            polled.set()
        elif path.endswith("/worker-status"):
            polled.wait(2)  # a lane that does not wait for the wishes polls meanwhile
        return True

    with (
        ReferenceServer(tmp_path / "server") as server,
        front(server, late_status) as url,
        # Times are those of production: a lane waits some seconds for the wishes.
        WorkerProcess(tmp_path / "worker", server, url=url, scale=1.0) as worker,
    ):
        eventually(server.workers)
        server.set_desired_state("vm102", "pause")
        worker.stop()
        polled.clear()
        job_id = _queue(server, {"steps": 1})
        worker.start()
        eventually(lambda: _answers(worker) and _status(worker)["desired"]["server"] == "pause")
        assert server.job(job_id)["attempts"] == []
        assert not polled.is_set()


def test_status_shows_what_runs_and_what_ended_and_no_secret(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    ended = _queue(server, {"steps": 1, "then": "fail"})
    server.wait_until_final(ended, 30)
    job_id = _queue(server, LONG)
    _processing(server, job_id)
    eventually(lambda: _status(worker)["running"][0]["fraction"])
    status = _status(worker)
    (running,) = status["running"]
    assert (running["job_id"], running["phase"], running["epochs"]) == (job_id, "train", LONG["steps"])
    end = next(end for end in status["last_ends"] if end["job_id"] == ended)
    assert (end["status"], end["error_code"]) == ("failed", "dataset_invalid")
    text = _cli(worker, "status").stdout
    assert "vm102 is busy" in text
    assert re.search(
        rf"^{job_id}  stub, attempt 1, since .*\n  █*░+ +\d+ %  train, epoch \d+/10000", text, re.MULTILINE
    )
    assert re.search(rf"failed +{ended} +(stub +)?[0-9.]+ s +dataset_invalid$", text, re.MULTILINE)
    assert (status["gpus"], status["no_gpus"]) == ([], "no NVIDIA driver")
    assert status["disk"].keys() == {"free_gb", "floor_gb", "workspace_gb", "model_store_gb", "looked_ago_s"}
    assert status["disk"]["free_gb"] > status["disk"]["floor_gb"] == 0.5
    assert "free (floor 0.5 GB)" in text
    assert json.loads(_cli(worker, "status", "--json").stdout).keys() == status.keys()
    with contextlib.closing(sqlite3.connect(worker.state_dir / "ledger.sqlite3")) as ledger:
        ((lease_token,),) = ledger.execute("SELECT lease_token FROM claims").fetchall()
    for secret in (lease_token, server.worker_token, server.s3_secret_key):
        assert secret not in text + json.dumps(status)


def test_cancel_ends_a_job_for_good_and_says_who_it_was(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = _queue(server, LONG)
    _processing(server, job_id)
    family = worker.tree()
    cancelled = _cli(worker, "cancel", job_id, "--wait", "--timeout", "30")
    assert cancelled.returncode == ExitCode.OK, cancelled.stderr
    assert f"{job_id} is over: cancelled" in cancelled.stdout
    job = server.job(job_id)  # at once: the report is delivered when the command returns
    assert (job["status"], job["error"]["code"], job["result"]) == (
        "cancelled",
        "cancelled_by_operator",
        None,
    )
    assert "by its operator" in job["error"]["message"]
    assert still_alive(family) == []
    assert worker.workspace_files() == []
    assert server.wait_until_final(_queue(server, {"steps": 1}), 30)["status"] == "completed"
    assert len(server.job(job_id)["attempts"]) == 1, "it did not come again"
    again = _cli(worker, "cancel", job_id)
    assert (again.returncode, again.stderr) == (
        ExitCode.FAILED,
        f"{job_id} has ended here: cancelled; running: nothing\n",
    )


def test_cancel_names_what_runs_and_leaves_it(server: ReferenceServer, worker: WorkerProcess) -> None:
    job_id = _queue(server, LONG)
    _processing(server, job_id)
    other = _cli(worker, "cancel", "no-such-job")
    assert other.returncode == ExitCode.FAILED
    assert f"no-such-job does not run here; running: {job_id}" in other.stderr
    assert _cli(worker, "cancel", "../etc").returncode == 2
    assert server.job(job_id)["status"] == "processing"
    waited = _cli(worker, "cancel", job_id, "--wait", "--timeout", "0")
    assert waited.returncode == ExitCode.TIMED_OUT
    assert server.wait_until_final(job_id, 30)["status"] == "cancelled", "the wish holds"


def test_logs_shows_the_workers_lines_and_the_childs_until_the_end(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    job_id = _queue(server, {"steps": 40, "step_s": 0.05, "then": "flood_log", "at_most_bytes": 700_000})
    _processing(server, job_id)
    with _begun(worker, "logs", job_id, "--follow") as following:
        said = following.communicate(timeout=30)[0].splitlines()
    assert following.returncode == ExitCode.OK
    assert "job.claimed stub, attempt 1" in said[0]
    assert sum("  | a line that goes on and on" in line.replace("<0>", "") for line in said) > 500
    assert any("job.completed" in line for line in said)
    assert server.job(job_id)["status"] == "completed"
    later = _cli(worker, "logs", job_id).stdout
    assert "earlier lines are not kept here" in later, "what is kept has a limit"
    assert len(later) < 400_000
    assert "job.completed" in later


def test_logs_says_where_to_look_for_what_is_gone(server: ReferenceServer, worker: WorkerProcess) -> None:
    gone = _cli(worker, "logs", "train-gone")
    assert gone.returncode == ExitCode.FAILED
    assert "train-gone neither runs here nor ended here lately" in gone.stderr
    assert "journalctl -u rvmcv-worker RVMCV_JOB_ID=train-gone" in gone.stderr
    assert "s3://models/cv/train-gone/attempt-<N>/" in gone.stderr


def test_the_model_store_is_emptied_but_for_what_a_running_job_may_use(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    store = worker.state_dir / "models"
    used, unused = store / ("a" * 64), store / ("b" * 64)
    unused.write_bytes(b"unused")
    long_ago_s = time.time() - 3600
    os.utime(unused, (long_ago_s, long_ago_s))
    job_id = _queue(server, LONG)
    _processing(server, job_id)
    used.write_bytes(b"used")
    client = ControlClient(worker.config_file.parent / "run")
    assert client.tell("wipe-store")["removed"] == 1
    assert (used.exists(), unused.exists()) == (True, False)
    client.cancel(job_id)
    client.wait_over(job_id, 30)
    eventually(lambda: not _status(worker)["claiming"])
    assert client.tell("wipe-store") == {"removed": 1, "model_store_gb": 0.0}
    assert not used.exists()


def test_a_watch_goes_on_while_the_worker_is_stopped_and_ends_at_ctrl_c(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    with Watched(_command(worker, "status", "--watch", "0.2"), rows=12, columns=80) as watched:
        watched.wait_for("vm102 is ready")
        watched.wait_for("more lines: a larger window shows them")
        worker.stop()
        watched.wait_for("the worker does not run")
        worker.start()
        eventually(lambda: _answers(worker))
        watched.forget()
        watched.wait_for("vm102 is ready")
        watched.resize(rows=40, columns=60)
        watched.wait_for("Last ends")
        watched.press(b"\x03")
        assert watched.wait() == ExitCode.OK
    assert watched.seen.endswith(b"\x1b[?25h\x1b[?1049l"), "the terminal is as it was"
    assert b"\x1b[2J" not in watched.seen, "nothing flickers"


def test_a_watch_of_a_worker_that_hangs_says_so(server: ReferenceServer, worker: WorkerProcess) -> None:
    with Watched(_command(worker, "status", "--watch", "0.2"), rows=24, columns=80) as watched:
        watched.wait_for("vm102 is ready")
        worker.send(signal.SIGSTOP)
        try:
            watched.wait_for("it hangs")
        finally:
            worker.send(signal.SIGCONT)
        watched.forget()
        watched.wait_for("vm102 is ready")
        watched.end()  # by SIGTERM
        assert watched.wait() == ExitCode.OK
    assert watched.seen.endswith(b"\x1b[?1049l")


def test_a_watch_into_a_pipe_is_plain_lines(server: ReferenceServer, worker: WorkerProcess) -> None:
    with _begun(worker, "status", "--watch", "0.2", "--json") as watching:
        for _ in range(2):
            assert json.loads(watching.stdout.readline())["worker_id"] == "vm102"
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == ExitCode.OK
    with _begun(worker, "status", "--watch", "0.2") as watching:
        assert re.fullmatch(r"\d\d:\d\d:\d\d\n", watching.stdout.readline())
        assert watching.stdout.readline().startswith("vm102 is ready  rvmcv-worker")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == ExitCode.OK


def test_a_command_without_a_worker_or_with_a_wrong_config_says_so(
    tmp_path: Path, server: ReferenceServer
) -> None:
    worker = WorkerProcess(tmp_path / "worker", server)
    for command in (["status"], ["drain"], ["pause"], ["resume"], ["cancel", "job"], ["logs", "job"]):
        answer = _cli(worker, *command)
        assert answer.returncode == ExitCode.NOT_RUNNING
        assert f"the worker does not run: nobody listens on {tmp_path}" in answer.stderr
    assert _cli(worker, "drain", "--timeout", "3").returncode == 2
    assert _cli(worker, "status", "3").returncode == 2
    assert _cli(worker, "status", "--watch", "nan").returncode == 2
    worker.config_file.write_text("[worker]\nruntime_dirr = 'x'")
    assert _cli(worker, "status").returncode == ExitCode.CONFIG


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_allowed(worker: WorkerProcess) -> None:
    runtime_dir = worker.config_file.parent / "run"
    code = (
        "import os, sys\n"
        "from rvmcv_worker.control_client import ControlClient, ControlError\n"
        "from pathlib import Path\n"
        "directory = os.open(sys.argv[1], os.O_PATH)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: ControlClient(Path(f'/proc/self/fd/{directory}')).tell('drain')\n"
        "except ControlError as error: print(error); sys.exit(error.code)\n"
    )
    for mode in (0o660, 0o666):  # by the file's mode, then by the kernel's word on who it is
        (runtime_dir / "health.sock").chmod(mode)
        runtime_dir.chmod(0o755)
        command = [sys.executable, "-c", code, str(runtime_dir)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == ExitCode.NOT_ALLOWED, found.stderr
        assert "run as root or as the worker's user" in found.stdout
    (runtime_dir / "health.sock").chmod(0o660)
    assert _status(worker)["desired"]["operator"] == "run"


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ReferenceServer]:
    """A server whose jobs the module's daemon cannot take."""
    with ReferenceServer(tmp_path / "server", settings=Settings(timing=Timing(report_interval_s=1.0))) as own:
        yield own


def test_a_new_token_is_tried_at_once_and_one_that_cannot_be_read_is_told(
    tmp_path: Path, own_server: ReferenceServer
) -> None:
    server = own_server
    # Times are those of production: without the signal the token would be read again after a minute.
    with WorkerProcess(tmp_path / "worker", server, token="wrong", scale=1.0, worker_id="vm103") as worker:
        eventually(lambda: "rejects the worker's token" in worker.log())
        job_id = _queue(server, {"steps": 1})
        worker.token_file.write_text("")
        worker.send(signal.SIGHUP)
        eventually(lambda: "the token could not be read again, the one before stays in force" in worker.log())
        worker.token_file.write_text("wrong")
        worker.send(signal.SIGHUP)
        eventually(lambda: "the token was read again: the same" in worker.log())
        worker.token_file.write_text(server.worker_token)
        start_s = time.monotonic()
        worker.send(signal.SIGHUP)
        assert server.wait_until_final(job_id, 30)["status"] == "completed"
        assert time.monotonic() - start_s < 20
        eventually(lambda: _status(worker)["reasons"] == [])
        assert "the token was read again: a new one" in worker.log()


def test_a_new_token_delivers_at_once_what_the_old_one_could_not(
    tmp_path: Path, own_server: ReferenceServer
) -> None:
    server = own_server

    def admin(method: str, path: str, **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {server.admin_token}", "Accept": "application/json"}
        answer = requests.request(
            method, f"{server.url}/api/v1/cv/{path}", headers=headers, timeout=10, **more
        )
        answer.raise_for_status()
        return answer.json()

    old, new = (
        admin("POST", "tokens", json={"name": name, "abilities": ["worker"]})["token"]
        for name in ("vm104-old", "vm104-new")
    )
    with WorkerProcess(tmp_path / "worker", server, token=old, scale=1.0, worker_id="vm104") as worker:
        job_id = _queue(server, {"steps": 3, "step_s": 1.0})
        server.wait_for_job(job_id, lambda job: job["status"] == "processing", 20)
        admin("DELETE", "tokens/vm104-old")
        eventually(lambda: "upload waits" in worker.log())
        worker.token_file.write_text(new)
        start_s = time.monotonic()
        worker.send(signal.SIGHUP)
        assert server.wait_until_final(job_id, 30)["status"] == "completed"
        assert time.monotonic() - start_s < 20


def test_worker_status_says_when_there_is_no_storage(tmp_path: Path) -> None:
    with (
        ReferenceServer(tmp_path / "server") as server,
        front(server, lambda path, _body: not path.endswith("/job-uploads")) as url,
        WorkerProcess(tmp_path / "worker", server, url=url, s3_keys=False) as worker,
    ):
        eventually(lambda: server.workers() and _seen_by_server(server)["reasons"])
        status = _seen_by_server(server)
        assert status["state"] == "ready", "it is no fault"
        assert "no storage" in status["reasons"][0]
        assert "upload-model only" in status["reasons"][0]
        assert "! no storage" in _cli(worker, "status").stdout
