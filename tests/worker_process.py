"""The real daemon as a process of its own, and what is seen of it from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from rvmcv_worker.demo.stage import to_toml
from rvmcv_worker.reference.server import ReferenceServer
from tests import canary


class WorkerProcess:
    """`rvmcv-worker run` against a server; a context manager that leaves nothing behind."""

    def __init__(
        self,
        directory: Path,
        server: ReferenceServer,
        *,
        url: str | None = None,
        token: str | None = None,
        job_types: tuple[str, ...] = ("stub",),
        s3_keys: bool = True,
        scale: float = 0.1,
        worker_id: str = "vm102",
        sandbox: str = "auto",
        extra: dict[str, dict[str, object]] | None = None,
        environment: dict[str, str] | None = None,
        program: tuple[str, ...] = ("-m", "rvmcv_worker.cli"),
    ) -> None:
        # One thread a child, as in `conftest.py`.
        self.environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        self._program = program
        self.state_dir = directory / "state"
        self.ledger_file = self.state_dir / "ledger.sqlite3"
        self.log_file = directory / "worker.log"
        self.config_file = directory / "config.toml"
        credentials = directory / "credentials"
        credentials.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.token_file = credentials / "token"
        self.token_file.write_text(server.worker_token if token is None else token)
        canary.hand_out(directory, self.token_file.read_text(), server.s3_access_key, server.s3_secret_key)
        if s3_keys:
            (credentials / "s3-access-key").write_text(server.s3_access_key)
            (credentials / "s3-secret-key").write_text(server.s3_secret_key)
        sections: dict[str, dict[str, object]] = {
            "server": {"url": url or server.url, "poll_wait_s": 2},
            "worker": {
                "id": worker_id,
                "job_types": list(job_types),
                "state_dir": str(self.state_dir),
                "runtime_dir": str(directory / "run"),
                "credentials_dir": str(credentials),
                "log_level": "DEBUG",
            },
            "sandbox": {"mode": sandbox},
            "storage": {
                "s3_endpoint": server.s3_endpoint if s3_keys else None,
                "allowed_hosts": [server.s3_endpoint.removeprefix("http://")],
                "plain_http_hosts": [server.s3_endpoint.removeprefix("http://")],
            },
            "limits": {"disk_floor_gb": 0.5},
            "timing": {"scale": scale},
        }
        for section, values in (extra or {}).items():
            sections.setdefault(section, {}).update(values)
        self.config_file.write_text(to_toml(sections))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> WorkerProcess:
        """Start the daemon; it takes a moment until it polls."""
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._program, "run", "--config", str(self.config_file)],
                stderr=log,
                stdout=log,
                env=self.environment,
            )
        return self

    def __enter__(self) -> WorkerProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the daemon if it runs, and wait until its children are gone too."""
        if self.is_alive():
            family = self.tree()
            self.stop()
            psutil.wait_procs(family, timeout=10)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the daemon runs."""
        return self._process is not None and self._process.poll() is None

    def send(self, signum: signal.Signals) -> None:
        """Send the daemon, and only it, a signal."""
        assert self._process is not None
        self._process.send_signal(signum)

    def stop(self, timeout_s: float = 60) -> int:
        """Send SIGTERM and return the exit status."""
        self.send(signal.SIGTERM)
        return self.wait(timeout_s)

    def kill(self) -> None:
        """Send SIGKILL to the daemon alone and wait for its end."""
        self.send(signal.SIGKILL)
        self.wait(10)

    def wait(self, timeout_s: float) -> int:
        """Return the exit status once the daemon has ended."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon did not end:\n{self.log()[-4000:]}") from None

    def log(self) -> str:
        """Return what the daemon has logged."""
        return self.log_file.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """Return every process that descends from the daemon."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workspace_files(self) -> list[Path]:
        """Return everything in the workspaces."""
        return list((self.state_dir / "work").glob("**/*"))

    def ledger(self, table: str) -> list[sqlite3.Row]:
        """Return the rows of `claims` or `outbox` at this moment."""
        with contextlib.closing(sqlite3.connect(self.ledger_file, timeout=10)) as db:
            db.row_factory = sqlite3.Row
            return db.execute(f"SELECT * FROM {table}").fetchall()


def still_alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return those that run; one that is dead and waits for its parent to notice does not."""
    _, alive = psutil.wait_procs(processes, timeout=0)
    return [process for process in alive if not _is_zombie(process)]


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def eventually(holds: Callable[[], object], timeout_s: float = 20.0, every_s: float = 0.02) -> None:
    """Wait until `holds` is true of something that sends no event; fails after `timeout_s`."""
    never = threading.Event()
    for _ in range(int(timeout_s / every_s)):
        if holds():
            return
        never.wait(every_s)
    raise AssertionError(f"not within {timeout_s} s: {holds}")
