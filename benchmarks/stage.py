"""The stage of each benchmark: a reference server and the real daemon beside it, as a process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rvmcv_worker.reference.server import ReferenceServer
from tests.worker_process import WorkerProcess, eventually


@contextlib.contextmanager
def stage(
    *, job_types: tuple[str, ...] = ("stub",), extra: dict[str, dict[str, object]] | None = None
) -> Iterator[tuple[ReferenceServer, WorkerProcess]]:
    """Start both with the intervals of production, and wait until the worker polls."""
    with (
        tempfile.TemporaryDirectory(prefix="rvmcv-bench-") as directory,
        ReferenceServer(Path(directory, "server")) as server,
        WorkerProcess(
            Path(directory, "worker"),
            server,
            scale=1.0,
            job_types=job_types,
            extra={"server": {"poll_wait_s": 25}, "worker": {"log_level": "INFO"}, **(extra or {})},
        ) as worker,
    ):
        eventually(server.workers)
        yield server, worker


def percentile(values: list[float], fraction: float) -> float:
    """Return the value that `fraction` of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(fraction * len(values)))]


def seconds_between(start: str, end: str) -> float:
    """Return the seconds between two times of the wire."""
    first, second = (datetime.fromisoformat(text.replace("Z", "+00:00")) for text in (start, end))
    return (second - first).total_seconds()
