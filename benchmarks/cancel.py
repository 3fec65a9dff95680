"""Cancel to process tree gone, for a child that listens and for one that ignores SIGTERM."""

from __future__ import annotations

import time

import psutil

from benchmarks.figures import Figure
from benchmarks.stage import stage

JOBS = 10


def measure() -> list[Figure]:
    """Cancel running jobs through the server's API, at the intervals of production."""
    return [
        Figure("cancel to process tree gone, slowest of 10", _slowest("complete"), "s", "<= 5"),
        Figure("the same, SIGTERM ignored", _slowest("ignore_sigterm"), "s", "<= 5"),
    ]


def _slowest(ending: str) -> float:
    took_s = []
    config = {"steps": 100_000 if ending == "complete" else 1, "step_s": 0.05, "then": ending}
    with stage() as (server, worker):
        for _ in range(JOBS):
            job_id = server.queue_training(config, job_type="stub")
            server.wait_for_job(job_id, lambda job: bool(job["fraction"]), 30)
            family = worker.tree()
            start_s = time.monotonic()
            server.cancel(job_id)
            psutil.wait_procs(family, timeout=60)
            took_s.append(time.monotonic() - start_s)
            server.wait_until_final(job_id, 30)
    return max(took_s)
