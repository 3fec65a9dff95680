"""What systemd and a person see when the worker cannot work."""

from __future__ import annotations

import pytest

from tests.installed import CONFIG, FAILED_UNIT, TOKEN, UNIT, Installed
from tests.worker_process import eventually

pytestmark = pytest.mark.slow

_DROP_IN = f"/etc/systemd/system/{UNIT}.d/zz-fault.conf"


def _failure(worker: Installed) -> str:
    """Return what the server, and with it a person, has been told last of why the worker has failed."""
    told = worker.told()
    alert = [alert for alert in worker.server.alerts() if alert["kind"] == "worker_failed"][-1]
    assert alert["message"] == f"vm102: {told['failure']}"
    return str(told["failure"])


def test_a_hung_daemon_is_killed_by_the_watchdog_and_started_again(worker: Installed) -> None:
    start, pid = worker.machine.cursor(), worker.main_pid()
    worker.machine.run(["kill", "-STOP", str(pid)])
    told = worker.machine.wait_line(
        lambda line: "Watchdog timeout" in str(line["MESSAGE"]), unit=UNIT, after=start
    )
    assert told["_PID"] == "1"
    worker.wait_event("worker.started", after=start)
    worker.wait_well()
    assert worker.main_pid() not in {0, pid}
    worker.completes(worker.queue())
    worker.nothing_is_left()


def test_a_wrong_token_shows_and_a_reload_with_the_right_one_mends_it(worker: Installed) -> None:
    start = worker.machine.cursor()
    right = worker.machine.read(TOKEN)
    worker.machine.write(TOKEN, "wrong-token\n", 0o600)
    worker.systemctl("restart")
    pid = worker.main_pid()
    rejected = worker.wait_event("token.rejected", after=start)
    assert "401" in rejected["MESSAGE"]
    assert rejected["PRIORITY"] == "3"
    eventually(lambda: "401" in str(worker.status().get("reasons")), 20, 0.2)
    assert worker.machine.state(UNIT) == "active"
    job_id = worker.queue()
    worker.machine.write(TOKEN, right, 0o600)
    worker.systemctl("reload")
    worker.wait_event("token.reloaded", after=start)
    worker.completes(job_id)
    assert worker.main_pid() == pid
    assert worker.machine.show(UNIT, "NRestarts") == "0"
    worker.nothing_is_left()


def test_a_broken_configuration_is_told_once_and_not_tried_again(worker: Installed) -> None:
    start = worker.machine.cursor()
    text = worker.machine.read(CONFIG)
    broken = text.replace("poll_wait_s =", "pol_wait_s =")
    assert broken != text
    worker.machine.write(CONFIG, broken)
    worker.systemctl("restart", check=False)
    assert worker.machine.state(UNIT) == "failed"
    assert worker.machine.show(UNIT, "ExecMainStatus") == "78"
    assert worker.machine.show(UNIT, "NRestarts") == "0"
    told = worker.machine.wait_line(
        lambda line: "pol_wait_s" in str(line["MESSAGE"]) and line["_PID"] != "1", unit=UNIT, after=start
    )
    assert f"{CONFIG}: unknown key 'server.pol_wait_s'; did you mean 'poll_wait_s'?" in told["MESSAGE"]
    worker.machine.wait_line(
        lambda line: str(line["MESSAGE"]).startswith("Finished"), unit=FAILED_UNIT, after=start
    )
    assert "pol_wait_s" in _failure(worker)


def test_three_failures_in_a_row_are_told_to_the_server(worker: Installed) -> None:
    start = worker.machine.cursor()
    worker.machine.write(_DROP_IN, "[Service]\nExecStart=\nExecStart=/bin/false\n")
    worker.machine.run(["systemctl", "daemon-reload"])
    try:
        worker.systemctl("restart", check=False)
        worker.machine.wait_state(UNIT, "failed")
        worker.machine.wait_line(
            lambda line: "Start request repeated too quickly" in str(line["MESSAGE"]), unit=UNIT, after=start
        )
        assert worker.machine.show(UNIT, "NRestarts") == "3"
        worker.machine.wait_line(
            lambda line: str(line["MESSAGE"]).startswith("Finished"), unit=FAILED_UNIT, after=start
        )
        assert "the worker has failed" in _failure(worker)
    finally:
        worker.machine.run(["rm", _DROP_IN])
        worker.machine.run(["systemctl", "daemon-reload"])
