"""Fifty trainings queued at once: in order, none lost, none twice, nothing left."""

from __future__ import annotations

import itertools
import time

from benchmarks.figures import Figure
from benchmarks.stage import stage

JOBS = 50


def measure() -> list[Figure]:
    """Queue stub jobs at once and look at what became of each."""
    with stage() as (server, worker):
        start_s = time.monotonic()
        queued = [server.queue_training({"steps": 1, "step_s": 0}, job_type="stub") for _ in range(JOBS)]
        for job_id in queued:
            server.wait_until_final(job_id, 300)
        seconds = time.monotonic() - start_s
        jobs = [server.job(job_id) for job_id in queued]
        started = [job["started_at"] for job in jobs]
        files, processes = len(worker.workspace_files()), len(worker.tree())
    return [
        Figure("50 queued jobs, lost", sum(job["status"] != "completed" for job in jobs), "jobs", "0"),
        Figure("50 queued jobs, run twice", sum(len(job["attempts"]) > 1 for job in jobs), "jobs", "0"),
        Figure(
            "50 queued jobs, out of order",
            sum(a > b for a, b in itertools.pairwise(started)),
            "jobs",
            "0",
        ),
        Figure("50 queued jobs, from queueing to the last end", seconds, "s"),
        Figure("files left in the workspace", files, "files", "0"),
        Figure("processes left", processes, "processes", "0"),
    ]
