"""Who can read the worker's token on an installed machine: nobody who need not."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.installed import UNIT, Installed
from tests.worker_process import eventually

pytestmark = pytest.mark.slow

#: Looks wherever a token could be and returns the files in which it is.
_LOOK = """
import glob, os
def _found(token):
    found = []
    places = ["/etc/rvmcv-worker", "/run/credentials", "/run/rvmcv-worker", "/var/lib/rvmcv-worker", "/proc",
              "/tmp", "/dev/shm", "/root", os.getcwd()]
    for place in places:
        for directory, below, files in os.walk(place):
            if place == "/proc" and directory.count("/") > 1:
                below.clear()
            for name in files:
                path = os.path.join(directory, name)
                if place == "/proc" and name not in {"environ", "cmdline", "stat"}:
                    continue
                try:
                    with open(path, "rb", buffering=0) as file:
                        if token in file.read(1 << 20):
                            found.append(path)
                except OSError:
                    pass
    return sorted(set(found))
"""
#: Makes a stub job that does so, and gives what it has found as its model. It is told the
#: token, so that it knows one when it sees one, in reverse.
_HOSTILE = f"""
{_LOOK}
def _look_for_the_token(job, child):
    import json
    found = _found(job["reversed"][::-1].encode())
    (child.directory / "model.bin").write_text(json.dumps(found))
ENDINGS["look_for_the_token"] = _look_for_the_token
"""


@pytest.fixture
def hostile(worker: Installed) -> Iterator[Installed]:
    """The worker with a job that steals: as a checkpoint that runs code would."""
    (stub,) = (
        worker.machine.inside("/opt/rvmcv-worker/current")
        .resolve()
        .parents[1]
        .glob("releases/*/lib/python3*/site-packages/rvmcv_worker/compute/stub.py")
    )
    before = stub.read_text()
    stub.unlink()  # the file may have a second name in the installer's cache
    stub.write_text(before + _HOSTILE)
    yield worker
    stub.write_text(before)


def test_no_job_can_read_the_token(hostile: Installed) -> None:
    token = hostile.server.worker_token
    job_id = hostile.queue(then="look_for_the_token", reversed=token[::-1])
    job = hostile.completes(job_id)
    found = json.loads(hostile.server.read_object(job["result"]["artifacts"]["model.bin"]))
    assert found == []


def test_where_a_job_would_look_it_is_for_the_daemon(worker: Installed) -> None:
    """The same look, by the daemon's user and with the daemon's eyes: else the one before proves nothing."""
    pid = str(worker.main_pid())
    user = ["setpriv", "--reuid=rvmcv-worker", "--regid=rvmcv-worker", "--clear-groups"]
    token = worker.server.worker_token
    script = f"{_LOOK}\nimport json, sys\nprint(json.dumps(_found(sys.stdin.read().encode())))"
    enter = ["nsenter", "--mount", "--wdns=/tmp", f"--target={pid}", "--"]
    found = worker.machine.run([*enter, *user, "python3", "-I", "-c", script], text=token)
    assert json.loads(found.stdout) == [f"/run/credentials/{UNIT}/token"]


def test_it_is_in_no_environment_no_command_line_no_property_and_no_log(worker: Installed) -> None:
    job_id = worker.run_until_progress()
    token = worker.server.worker_token
    seen = worker.machine.run(
        ["sh", "-c", "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'"]
    ).stdout
    assert "CREDENTIALS_DIRECTORY=" in seen  # the daemon's environment is among them
    told = worker.machine.ask(["systemctl", "show", UNIT]) + worker.machine.ask(["systemctl", "status", UNIT])
    logged = json.dumps(worker.machine.journal())
    assert UNIT in told
    assert "rvmcv-worker" in logged
    for text in (seen, told, logged, json.dumps(worker.status())):
        assert token not in text
    worker.server.cancel(job_id)
    eventually(lambda: worker.workspaces() == [])
