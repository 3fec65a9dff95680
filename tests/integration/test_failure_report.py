"""`report-failure`, when the worker has failed for good, against the real server."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker import failure_report, instance, unit_result
from rvmcv_worker.config import ConfigError
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.reference.server import ReferenceServer
from tests.front import front
from tests.reference_talker import Talker
from tests.worker_process import WorkerProcess, eventually

LONG = {"steps": 10_000, "step_s": 0.05}


@pytest.fixture
def worker(tmp_path: Path, server: ReferenceServer) -> Iterator[WorkerProcess]:
    """One that has not been started."""
    prepared = WorkerProcess(tmp_path / "worker", server, scale=0.05)
    prepared.state_dir.mkdir(parents=True)
    yield prepared
    prepared.close()


def _report(worker: WorkerProcess) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "rvmcv_worker.cli",
        "report-failure",
        "--config",
        str(worker.config_file),
    ]
    return subprocess.run(
        [*command, "--unit", f"no-{uuid.uuid4().hex}.service"], capture_output=True, text=True, check=False
    )


def _alerts(server: ReferenceServer) -> list[dict[str, Any]]:
    return [alert for alert in server.alerts() if alert["kind"] == "worker_failed"]


def test_it_speaks_as_the_daemon_that_failed_and_the_next_start_hands_its_job_back(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    worker.start()
    eventually(server.workers)
    assert _report(worker).stdout == "a worker runs: nothing to report\n"
    job_id = server.queue_training(LONG, job_type="stub")
    eventually(lambda: server.job(job_id)["progress"])
    worker.kill()
    done = _report(worker)
    assert done.returncode == ExitCode.OK, done.stderr
    (shown,) = server.workers()
    assert shown["status"]["state"] == "degraded"
    assert not any(shown["status"]["claims"].values())
    assert "journalctl -u rvmcv-worker" in shown["status"]["reasons"][0]
    assert server.job(job_id)["status"] == "processing", "its lease runs out, or the next start hands it back"
    (alert,) = _alerts(server)
    assert alert["worker_id"] == "vm102"
    assert "the worker has failed: " in alert["message"]
    assert _report(worker).returncode == ExitCode.OK
    assert len(_alerts(server)) == 1, "once"
    worker.start()
    eventually(lambda: "the worker died while the job was running" in str(server.job(job_id)))
    server.cancel(job_id)


def test_what_is_wrong_with_the_configuration_is_told(server: ReferenceServer, worker: WorkerProcess) -> None:
    worker.config_file.write_text(f"{worker.config_file.read_text()}\n[dataset]\nval_fractoin = 0.1\n")
    done = _report(worker)
    assert done.returncode == ExitCode.OK, done.stderr
    (alert,) = _alerts(server)
    assert "unknown key 'dataset.val_fractoin'; did you mean 'val_fraction'?" in alert["message"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[server]\nurl = "vm100"\n', "server.url: "),
        ("[server\n", "not TOML"),
        ('[worker]\nid = "a b"\n', "worker.id: "),
    ],
)
def test_nobody_is_told_by_a_configuration_that_says_not_whom(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        failure_report.what_it_needs(file)


def test_without_a_token_nobody_is_told(worker: WorkerProcess) -> None:
    worker.token_file.unlink()
    done = _report(worker)
    assert (done.returncode, "not told" in done.stderr, "no token" in done.stderr) == (
        ExitCode.CONFIG,
        True,
        True,
    )


def test_a_later_daemon_of_this_name_is_not_talked_over(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    instances = [str(uuid.uuid4()) for _ in range(2)]
    talker = Talker(server)
    talker.worker_id = "vm102"
    for instance_id in instances:
        talker.instance_id = instance_id
        talker.status()
    instance.note(worker.state_dir, instances[0])
    done = _report(worker)
    assert (done.returncode, "another daemon" in done.stderr) == (ExitCode.FAILED, True)
    assert _alerts(server) == []
    assert server.workers()[0]["status"]["state"] == "ready"


def test_it_gives_up_in_time(server: ReferenceServer, worker: WorkerProcess) -> None:
    settings, wrong = failure_report.what_it_needs(worker.config_file)
    assert wrong is None
    url = {"server": settings.server.model_copy(update={"url": "http://127.0.0.1:9"})}
    with pytest.raises(failure_report.NotReportedError, match="not within 10 s"):
        failure_report.report(settings.model_copy(update=url), "x", runs_again=lambda: False, patience_s=10)


def test_the_instance_that_was_noted_last_is_known(tmp_path: Path) -> None:
    assert instance.last(tmp_path) is None
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    for instance_id in (first, second):
        instance.note(tmp_path, instance_id)
        assert instance.last(tmp_path) == instance_id
    (tmp_path / instance.FILE_NAME).write_text("no id\n")
    assert instance.last(tmp_path) is None
    instance.note(tmp_path / "not there", first)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            {"Result": "watchdog", "ExecMainCode": "3", "ExecMainStatus": "6"},
            "its main loop hung, and systemd ended it; signal SIGABRT ended it",
        ),
        (
            {"Result": "exit-code", "ExecMainCode": "1", "ExecMainStatus": "78"},
            "it ended with status 78 (its configuration or its token cannot be used)",
        ),
        ({"Result": "exit-code", "ExecMainCode": "1", "ExecMainStatus": "203"}, "it ended with status 203"),
        ({"Result": "signal", "ExecMainCode": "2", "ExecMainStatus": "9"}, "signal SIGKILL ended it"),
        ({"Result": "signal", "ExecMainCode": "2", "ExecMainStatus": "40"}, "signal 40 ended it"),
        ({}, "how it ended systemd does not say"),
    ],
)
def test_how_systemd_saw_it_end_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, str], said: str
) -> None:
    program = tmp_path / "systemctl"
    program.write_text("#!/bin/sh\n" + "".join(f"echo {name}={value}\n" for name, value in found.items()))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("MONITOR_SERVICE_RESULT", raising=False)
    assert unit_result.why_failed("x.service") == said
    assert not unit_result.is_active("x.service")


def test_a_server_that_does_not_know_the_field_is_told_by_reasons(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    settings, _ = failure_report.what_it_needs(worker.config_file)
    sent: list[dict[str, Any]] = []

    def refuses(path: str, body: bytes) -> bool:
        if path.endswith("/worker-status"):
            sent.append(json.loads(body))
        return path.endswith("/worker-status") and "failure" in sent[-1]

    with front(server, lambda _path, _body: True, refuses=refuses) as url:
        older_server = {"server": settings.server.model_copy(update={"url": url})}
        assert failure_report.report(
            settings.model_copy(update=older_server), "a fault", runs_again=lambda: False
        )
    assert ["failure" in status for status in sent] == [True, False]
    assert "the worker has failed: a fault; " in sent[1]["reasons"][0]
    assert server.workers()[0]["status"]["state"] == "degraded"
