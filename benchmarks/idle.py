"""What an idle daemon costs: memory, CPU, polls."""

from __future__ import annotations

import threading

import psutil

from benchmarks.figures import Figure
from benchmarks.stage import stage

SETTLE_S, MEASURE_S = 10.0, 120.0


def measure() -> list[Figure]:
    """Leave the daemon alone and watch it."""
    pause = threading.Event()
    with stage() as (server, worker):
        process = psutil.Process(worker.pid)
        pause.wait(SETTLE_S)
        rss_mb = [process.memory_info().rss / 1e6]
        cpu_s = sum(process.cpu_times()[:2])
        polls = server.polls
        for _ in range(int(MEASURE_S / 5)):
            pause.wait(5)
            rss_mb.append(process.memory_info().rss / 1e6)
        cpu_s = sum(process.cpu_times()[:2]) - cpu_s
        polls = server.polls - polls
    return [
        Figure("idle daemon, resident memory", max(rss_mb), "MB", "<= 85"),
        Figure("idle daemon, growth of resident memory", rss_mb[-1] - rss_mb[0], "MB", "flat"),
        Figure("idle daemon, CPU", 100 * cpu_s / MEASURE_S, "%", "<= 0.5"),
        Figure("idle daemon, polls", 60 * polls / MEASURE_S, "/min", "<= 8"),
    ]
