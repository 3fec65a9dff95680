"""The reference server as a process of its own, as an admin starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

CLI = [sys.executable, "-c", "from rvmcv_worker.reference.cli import main; main()"]
STOP_TIMEOUT_S = 20.0


class ReferenceProcess:
    """`rvmcv-reference serve` from `__enter__` to `__exit__`."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        self._ready = data_dir / "ready.json"
        self._command = [*CLI, "serve", "--port", "0", "--data-dir", str(data_dir), *options]
        self._command += ["--ready-file", str(self._ready)]

    def __enter__(self) -> ReferenceProcess:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"the server ended with {self._process.wait()} instead of listening")
        state = json.loads(self._ready.read_text())
        self.url: str = state["url"]
        self.worker_token: str = state["worker_token"]
        self.admin_token: str = state["admin_token"]
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=STOP_TIMEOUT_S)
        finally:
            self._process.kill()

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self._process.pid

    def queue_training(self, config: dict[str, Any], *, job_type: str = "yolo11") -> str:
        """Queue a job and return its id."""
        body = {"job_type": job_type, "dataset_url": "s3://datasets/none.zip", "options": config}
        return str(self._admin("POST", "train", json=body)["job_id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job."""
        return self._admin("GET", f"job/{job_id}")

    def workers(self) -> set[str]:
        """Return the names of the workers that have called."""
        return {worker["worker_id"] for worker in self._admin("GET", "metrics")["workers"]}

    def cancel(self, job_id: str) -> None:
        """Cancel a job."""
        self._admin("DELETE", f"job/{job_id}/cancel")

    def _admin(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.admin_token}", "Accept": "application/json"}
        answer = requests.request(
            method, f"{self.url}/api/v1/cv/{path}", headers=headers, timeout=30, **options
        )
        answer.raise_for_status()
        return dict(answer.json())
