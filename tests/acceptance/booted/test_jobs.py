"""A job on an installed machine: behind the wall in the hardened unit, through stops, kills, power cuts."""

from __future__ import annotations

import time

import pytest

from tests.installed import UNIT, Installed

pytestmark = pytest.mark.slow

#: "Gone within 60 s", says docs/architecture.md of SIGTERM; a stub is quicker.
_STOP_S = 60.0


def test_a_job_runs_behind_the_wall_and_leaves_nothing(worker: Installed) -> None:
    start = worker.machine.cursor()
    job_id = worker.queue(steps=3, step_s=0.05)
    worker.completes(job_id)
    assert worker.told()["sandbox"] == "bubblewrap"
    claimed = worker.wait_event("job.claimed", after=start)
    done = worker.wait_event("job.completed", after=start)
    assert job_id in {claimed["RVMCV_JOB_ID"]} & {done["RVMCV_JOB_ID"]}
    assert claimed["PRIORITY"] == "6"
    worker.nothing_is_left()


def test_a_stop_in_the_middle_hands_the_job_back(worker: Installed) -> None:
    job_id = worker.run_until_progress(then_in=1)
    start, before_s = worker.machine.cursor(), time.monotonic()
    worker.systemctl("stop")
    assert time.monotonic() - before_s < _STOP_S
    assert worker.machine.show(UNIT, "Result") == "success"
    assert worker.machine.show(UNIT, "ExecMainStatus") == "0"
    assert worker.first_error(job_id)["code"] == "worker_stopped"
    worker.wait_event("worker.stopped", after=start)
    assert worker.processes() == []
    assert worker.workspaces() == []
    worker.systemctl("start")
    worker.server.wait_for_job(job_id, lambda job: job["attempt"] == 2, 40)
    worker.server.cancel(job_id)
    worker.nothing_is_left()


def test_a_killed_daemon_is_started_again_and_says_what_became_of_its_job(worker: Installed) -> None:
    job_id = worker.queue(steps=40, step_s=0.1)
    worker.server.wait_for_job(job_id, lambda job: bool(job["fraction"]), 40)
    start, pid = worker.machine.cursor(), worker.main_pid()
    worker.machine.run(["kill", "-KILL", str(pid)])
    assert worker.first_error(job_id)["code"] == "worker_died"
    worker.completes(job_id, attempts=2)
    assert worker.main_pid() not in {0, pid}
    assert worker.machine.show(UNIT, "NRestarts") == "1"
    handed_back = worker.wait_event("job.handed_back", after=start)
    assert handed_back["RVMCV_JOB_ID"] == job_id
    worker.nothing_is_left()


def test_a_reboot_in_the_middle_of_a_job(worker: Installed) -> None:
    job_id = worker.queue(steps=30, step_s=0.1)
    worker.server.wait_for_job(job_id, lambda job: bool(job["fraction"]), 40)
    worker.machine.reboot()
    assert worker.first_error(job_id)["code"] == "worker_stopped"
    worker.completes(job_id, attempts=2)
    worker.nothing_is_left()


def test_a_power_cut_in_the_middle_of_a_job(worker: Installed) -> None:
    job_id = worker.queue(steps=30, step_s=0.1)
    worker.server.wait_for_job(job_id, lambda job: bool(job["fraction"]), 40)
    worker.machine.cut_power()
    assert worker.workspaces() != []
    worker.machine.switch_on()
    assert worker.first_error(job_id)["code"] == "worker_died"
    worker.completes(job_id, attempts=2)
    worker.nothing_is_left()


def test_what_a_power_cut_left_is_wiped_at_the_next_boot_though_the_worker_does_not_start(
    worker: Installed,
) -> None:
    job_id = worker.run_until_progress()
    worker.machine.cut_power()
    assert worker.workspaces() != []
    wants = worker.machine.inside(f"/etc/systemd/system/multi-user.target.wants/{UNIT}")
    target = wants.readlink()
    wants.unlink()
    worker.machine.switch_on()
    assert worker.machine.state(UNIT) == "inactive"
    worker.machine.wait_state("rvmcv-worker-wipe.service", "inactive")
    assert worker.machine.show("rvmcv-worker-wipe.service", "Result") == "success"
    left = [path.name for path in worker.machine.inside("/var/lib/rvmcv-worker/work").rglob("*.bin")]
    assert left == []
    wants.symlink_to(target)
    worker.systemctl("start")
    worker.first_error(job_id)
    worker.server.cancel(job_id)
    worker.nothing_is_left()
