"""The worker as `install.sh` installs it, in a booted system, and what is seen of it there."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker.reference.server import ReferenceServer
from tests.booted import Booted, Line
from tests.worker_process import eventually

UNIT, FAILED_UNIT = "rvmcv-worker.service", "rvmcv-worker-failed.service"
CONFIG, TOKEN = "/etc/rvmcv-worker/config.toml", "/etc/rvmcv-worker/credentials/token"
COMMAND = "/usr/local/bin/rvmcv-worker"
_DROP_IN = f"/etc/systemd/system/{UNIT}.d/test.conf"
#: What the tests need not wait for; the rest of the unit is as it is installed.
_QUICK = "[Service]\nRestartSec=100ms\nWatchdogSec=3\nTimeoutAbortSec=5\n"
_SOURCE = Path(__file__).parents[1]
#: What of a source tree an installation needs.
_OF_SOURCE = ("install.sh", "installer", "systemd", "rvmcv_worker", "config.toml", "pyproject.toml")
_OF_SOURCE += ("requirements.lock", "README.md", "LICENSE")
_INSTALL_S = 900.0


class Installed:
    """A machine with a worker, and the server that it calls."""

    def __init__(self, machine: Booted, server: ReferenceServer, wheelhouse: Path) -> None:
        self.machine, self.server = machine, server
        shutil.copytree(wheelhouse, machine.inside("/root/wheelhouse"))
        self.put_source("/root/source")
        machine.write("/root/token", server.worker_token, 0o600)

    def put_source(self, path: str) -> Path:
        """Put this source tree into the system; returns where this machine sees it."""
        tree = self.machine.inside(path)
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        for name in _OF_SOURCE:
            of = _SOURCE / name
            if of.is_dir():
                shutil.copytree(of, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(of, tree / name)
        return tree

    def installer(self, *options: str, source: str = "/root/source") -> subprocess.CompletedProcess[str]:
        """Run `install.sh`, whatever comes of it."""
        argv = [f"{source}/install.sh", *options]
        return self.machine.run(argv, check=False, timeout_s=_INSTALL_S)

    def install(self, *more: str, source: str = "/root/source") -> subprocess.CompletedProcess[str]:
        """Install, or upgrade, from the wheelhouse."""
        given = (
            "--wheelhouse",
            "/root/wheelhouse",
            "--token-file",
            "/root/token",
            "--server",
            self.server.url,
        )
        return self.installer(*given, "--cpu", *more, source=source)

    def make_quick(self) -> None:
        """Have it restart at once, take files from the test's own store, and be content with little disk."""
        self.machine.write(_DROP_IN, _QUICK)
        text, store = self.machine.read(CONFIG), self.server.s3_endpoint.removeprefix("http://")
        for before, after in (
            ("disk_floor_gb = 10.0", "disk_floor_gb = 0.5"),
            ("plain_http_hosts = []", f'plain_http_hosts = ["{store}"]'),
        ):
            assert before in text
            text = text.replace(before, after)
        self.machine.write(CONFIG, text)
        self.machine.run(["systemctl", "daemon-reload"])
        self.systemctl("restart")

    def systemctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Do something to the worker's unit."""
        return self.machine.run(["systemctl", *words, UNIT], check=check)

    def main_pid(self) -> int:
        """Return the daemon's process as it is numbered inside; 0 where none runs."""
        return int(self.machine.show(UNIT, "MainPID"))

    def status(self) -> dict[str, Any]:
        """Return what the health socket says; nothing while it does not answer."""
        done = self.machine.run([COMMAND, "status", "--json"], check=False)
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return found

    def told(self) -> dict[str, Any]:
        """Return the last status that the server has of it; `doctor` called under a name of its own."""
        (seen,) = (each for each in self.server.workers() if each["worker_id"] == "vm102")
        status: dict[str, Any] = seen["status"]
        return status

    def wait_well(self) -> None:
        """Wait until it runs and would claim."""
        self.machine.wait_state(UNIT, "active")
        eventually(lambda: self.status().get("state") in {"ready", "busy"}, 30.0, 0.2)

    def queue(self, **config: Any) -> str:
        """Queue a stub job."""
        return self.server.queue_training({"steps": 1, **config}, job_type="stub")

    def run_until_progress(self, **config: Any) -> str:
        """Queue a job that lasts, and return its id once its child has said how far it is."""
        job_id = self.queue(**{"steps": 600, "step_s": 0.1, **config})
        self.server.wait_for_job(job_id, lambda job: job["phase"] == "train" and bool(job["fraction"]), 40)
        return job_id

    def completes(self, job_id: str, *, attempts: int = 1, within_s: float = 40) -> dict[str, Any]:
        """Wait until a job is done in so many attempts."""
        job = self.server.wait_until_final(job_id, within_s)
        assert (job["status"], len(job["attempts"])) == ("completed", attempts), job["attempts"]
        return job

    def first_error(self, job_id: str, within_s: float = 40) -> dict[str, Any]:
        """Return what the job's first attempt ended of, once it has."""
        job = self.server.wait_for_job(
            job_id, lambda job: bool(job["attempts"] and job["attempts"][0]["error"]), within_s
        )
        error: dict[str, Any] = job["attempts"][0]["error"]
        return error

    def wait_event(self, name: str, *, after: str, holds: Callable[[Line], object] | None = None) -> Line:
        """Return the first line of the worker's journal after `after` with this event, once it is there."""
        return self.machine.wait_line(
            lambda line: line.get("RVMCV_EVENT") == name and (holds is None or holds(line)),
            unit=UNIT,
            after=after,
        )

    def workspaces(self) -> list[str]:
        """Return what lies in the worker's `work` directory."""
        return sorted(path.name for path in self.machine.inside("/var/lib/rvmcv-worker/work").iterdir())

    def processes(self) -> list[int]:
        """Return the worker's processes, by their numbers inside."""
        found = self.machine.run(["pgrep", "--uid", "rvmcv-worker"], check=False).stdout
        return [int(pid) for pid in found.split()]

    def nothing_is_left(self) -> None:
        """Wait until there is no file and no process of a job."""
        eventually(lambda: self.workspaces() == [], 20.0)
        eventually(lambda: self.processes() in ([], [self.main_pid()]), 20.0, 0.1)


@dataclass(frozen=True)
class FirstRun:
    """The worker just after the first run of `install.sh`, and what that said."""

    worker: Installed
    status: int
    told: str
