"""Queued to claimed: how long a job waits for an idle worker, over loopback."""

from __future__ import annotations

import threading

from benchmarks.figures import Figure
from benchmarks.stage import percentile, seconds_between, stage

JOBS = 200


def measure() -> list[Figure]:
    """Queue one job after another, each to a worker that holds a poll."""
    waits_ms = []
    pause = threading.Event()
    with stage() as (server, _worker):
        for _ in range(JOBS):
            pause.wait(0.1)  # the poll that follows a job is held again
            job = server.wait_until_final(server.queue_training({"steps": 0}, job_type="stub"), 60)
            waits_ms.append(1000 * seconds_between(job["created_at"], job["started_at"]))
    return [
        Figure("queued to claimed, p50", percentile(waits_ms, 0.5), "ms", "<= 10"),
        Figure("queued to claimed, p99", percentile(waits_ms, 0.99), "ms", "<= 50"),
    ]
