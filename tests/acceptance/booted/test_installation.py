"""What `install.sh` leaves on a machine, and that it does nothing twice."""

from __future__ import annotations

import hashlib
import re

import pytest

from tests.installed import COMMAND, CONFIG, TOKEN, UNIT, FirstRun, Installed

pytestmark = pytest.mark.slow


def _tree(worker: Installed) -> dict[str, str]:
    """Return each file that an installation could change, with what it is and holds."""
    found = {}
    for top in ("/etc", "/opt", "/usr/local"):
        for path in worker.machine.inside(top).rglob("*"):
            about = path.lstat()
            held = (
                hashlib.sha256(path.read_bytes()).hexdigest()
                if path.is_file() and not path.is_symlink()
                else ""
            )
            link = str(path.readlink()) if path.is_symlink() else ""
            found[str(path)] = (
                f"{about.st_mode:o} {about.st_uid}:{about.st_gid} {about.st_mtime_ns} {held}{link}"
            )
    return found


def test_one_command_installs_starts_and_looks_whether_all_is_well(first: FirstRun) -> None:
    assert first.status == 0, first.told
    for line in (r"ok +token +accepted", r"ok +wall +bubblewrap works", r"ok +jobs +claims stub"):
        assert re.search(line, first.told), first.told
    machine = first.worker.machine
    assert machine.state(UNIT) == "active"
    assert machine.ask(["systemctl", "is-enabled", UNIT]) == "enabled"
    assert machine.ask(["systemctl", "is-enabled", "rvmcv-worker-wipe.timer"]) == "enabled"
    assert machine.ask(["stat", "--format=%a %U", TOKEN, CONFIG]).split("\n") == ["600 root", "644 root"]
    assert machine.ask(["stat", "--format=%a %U", "/var/lib/rvmcv-worker"]) == "700 rvmcv-worker"
    assert machine.ask(["systemctl", "list-units", "--failed", "--plain", "--no-legend"]) == ""


def test_run_again_it_changes_nothing(first: FirstRun) -> None:
    worker = first.worker
    before, pid = _tree(worker), worker.main_pid()
    again = worker.install("--without-compute")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing had to be changed" in again.stdout
    assert _tree(worker) == before
    assert worker.main_pid() == pid


def test_the_service_user_can_write_neither_programs_nor_settings(first: FirstRun) -> None:
    run = ["setpriv", "--reuid=rvmcv-worker", "--regid=rvmcv-worker", "--clear-groups", "find"]
    found = first.worker.machine.run(
        [*run, "/opt", "/usr/local", "/etc/rvmcv-worker", "-writable", "!", "-type", "l"], check=False
    )
    assert found.stdout == ""


def test_no_port_is_open(worker: Installed) -> None:
    job_id = worker.run_until_progress()
    assert worker.machine.ask(["ss", "--no-header", "-ltn"]) == ""
    assert worker.machine.ask(["ss", "--no-header", "-lun"]) == ""
    connected = worker.machine.ask(["ss", "--no-header", "-tn"])  # so that `ss` does see what there is
    assert worker.machine.host_address in connected
    worker.server.cancel(job_id)
    worker.nothing_is_left()


def test_it_reaches_its_server_alone(worker: Installed) -> None:
    routes = worker.machine.ask(["ip", "route"])
    assert len(routes.splitlines()) == 1
    assert "default" not in routes


def test_what_cannot_be_exercised_here_is_set(first: FirstRun) -> None:
    show = first.worker.machine.show
    assert {name: show(UNIT, name) for name in ("Type", "KillMode", "TasksMax", "OOMPolicy")} == {
        "Type": "notify",
        "KillMode": "mixed",
        "TasksMax": "32768",
        "OOMPolicy": "continue",
    }
    assert show(UNIT, "DevicePolicy") == "closed"
    assert "char-nvidia rwm" in show(UNIT, "DeviceAllow")
    assert "char-nvidiactl rwm" in show(UNIT, "DeviceAllow")
    assert int(show(UNIT, "MemoryMax")) > 0
    assert show(UNIT, "TimeoutStopUSec") == "2min"
    assert show(UNIT, "NoNewPrivileges") == "yes"
    assert first.worker.machine.run([COMMAND, "version"]).stdout.strip()
