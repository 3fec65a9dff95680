"""A GET on a worker's unix socket, as `curl --unix-socket` makes it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from rvmcv_worker.control_client import _UnixConnection
from rvmcv_worker.health import FILE_NAME


def get(runtime_dir: Path, path: str, timeout_s: float = 10.0) -> tuple[int, str, str]:
    """Return status, content type and body."""
    with contextlib.closing(_UnixConnection(runtime_dir / FILE_NAME, timeout_s)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
