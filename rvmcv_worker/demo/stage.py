"""What the demo runs on: the reference RVM-Server and the real daemon, each a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from rvmcv_worker.reference.state_file import State

START_TIMEOUT_S = 60.0
#: From SIGTERM to SIGKILL; the daemon gives its own children 20 s.
STOP_TIMEOUT_S = 30.0
#: How the workspaces that are the worker's own begin, of its engines and exports; no job's id does.
OWN_PREFIX = "_"
JOB_TYPES = ("yolo11", "sam2", "inference", "batch-inference")

#: `rvmcv-reference`, wherever the package is installed.
_REFERENCE = "from rvmcv_worker.reference.cli import main; main()"

Sections = Mapping[str, Mapping[str, object]]


class StageError(Exception):
    """A process did not start or ended early; the message ends with what it said last."""


@dataclass(frozen=True)
class Stage:
    """Both processes, running."""

    #: Addresses and tokens of the server.
    state: State
    server: Actor
    daemon: Actor
    #: Where the daemon makes a folder for each attempt.
    workspaces: Path

    def check(self) -> None:
        """Raise `StageError` if one of the two has ended."""
        for actor in (self.server, self.daemon):
            if not actor.runs:
                raise StageError(f"{actor.name} has ended early; its last lines:\n{actor.last_lines()}")

    def left_by_jobs(self) -> int:
        """How many files and folders are in the workspaces of jobs; a warm engine's is none of those."""
        jobs = [folder for folder in self.workspaces.glob("*") if not folder.name.startswith(OWN_PREFIX)]
        return sum(1 + sum(1 for _ in folder.rglob("*")) for folder in jobs)

    def left_over(self) -> int:
        """How many files and folders are in the workspaces, the worker's own included."""
        return sum(1 for _ in self.workspaces.rglob("*"))


class Actor:
    """One process, its log, and its end."""

    def __init__(self, name: str, command: list[str], directory: Path) -> None:
        self.name = name
        self._log = directory / "log.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_dies_with_us(), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": str(directory)},
                # Ctrl-C is for the demo, which then ends the others in their order.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def last_lines(self, count: int = 15) -> str:
        """What it said last."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-count:])

    def stop(self) -> None:
        """End it, with what it started, and wait for that."""
        family = [] if not self.runs else psutil.Process(self.pid).children(recursive=True)
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            process.kill()


@contextmanager
def set_up(directory: Path) -> Iterator[Stage]:
    """Start both in `directory`; whatever happens, both are gone afterwards."""
    server_dir, daemon_dir = directory / "server", directory / "worker"
    server_dir.mkdir(mode=0o700)
    daemon_dir.mkdir(mode=0o700)
    ready = server_dir / "ready.json"
    serve = ["serve", "--port", "0", "--data-dir", str(server_dir / "data"), "--ready-file", str(ready)]
    serve += ["--report-interval-s", "1"]
    server = Actor("the RVM-Server", [sys.executable, "-c", _REFERENCE, *serve], server_dir)
    try:
        state = _wait_for_state(server, ready)
        config_file = write_config(daemon_dir, state)
        run = ["-m", "rvmcv_worker.cli", "run", "--config", str(config_file)]
        daemon = Actor("the daemon", [sys.executable, *run], daemon_dir)
        try:
            yield Stage(state, server, daemon, daemon_dir / "state" / "work")
        finally:
            daemon.stop()
    finally:
        server.stop()


def write_config(directory: Path, state: State) -> Path:
    """Write the daemon's `config.toml` and the files of its secrets; returns the former."""
    credentials = directory / "credentials"
    credentials.mkdir(mode=0o700)
    secrets = {
        "token": state.worker_token,
        "s3-access-key": state.s3_access_key,
        "s3-secret-key": state.s3_secret_key,
    }
    for name, secret in secrets.items():
        with os.fdopen(os.open(credentials / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret)
    config_file = directory / "config.toml"
    config_file.write_text(
        to_toml(
            {
                "server": {"url": state.url},
                "worker": {
                    "id": "demo",
                    "job_types": JOB_TYPES,
                    "state_dir": str(directory / "state"),
                    "runtime_dir": str(directory / "run"),
                    "credentials_dir": str(credentials),
                },
                "sandbox": {"mode": "auto"},
                "storage": {"s3_endpoint": state.s3_endpoint},
                "limits": {"disk_floor_gb": 1.0},
            }
        )
    )
    return config_file


def to_toml(sections: Sections) -> str:
    """Return sections of scalars and lists as TOML; None is left out."""
    lines: list[str] = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return str(value)


def _dies_with_us() -> list[str]:
    """What makes a process end when the demo itself is killed."""
    found = shutil.which("setpriv")
    return [found, "--pdeathsig", "TERM", "--"] if found else []


def _wait_for_state(server: Actor, ready: Path) -> State:
    pause = threading.Event()
    ends_s = time.monotonic() + START_TIMEOUT_S
    while (state := State.load(ready)) is None:
        if not server.runs:
            raise StageError(f"{server.name} did not start; its last lines:\n{server.last_lines()}")
        if time.monotonic() > ends_s:
            raise StageError(f"{server.name} did not start within {START_TIMEOUT_S:.0f} s")
        pause.wait(0.05)
    return state
