"""How soon work goes on after a kill, and how soon a tree is gone that ignores SIGTERM."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.figures import Figure
from rvmcv_worker.reference.settings import Timing
from tests.fault_stage import Stage, open_stage
from tests.network_faults import drop_request
from tests.reference_talker import Talker

TURNS = 5
#: Longest `status_busy_s` + `cancel_grace_s` + 2 s of the defaults.
TREE_GONE_S = 3.0 + 1.5 + 2.0
LEASE_S = 3.0


def measure() -> list[Figure]:
    """Kill, cancel and fence at the intervals of production; only the lease is short."""
    tree_gone = f"<= {TREE_GONE_S:g}"
    timing = Timing(lease_train_s=LEASE_S)
    production: dict[str, dict[str, object]] = {
        "server": {"poll_wait_s": 25, "read_timeout_s": 30.0, "connect_timeout_s": 5.0},
        "worker": {"log_level": "INFO"},
    }
    with (
        tempfile.TemporaryDirectory(prefix="rvmcv-bench-") as directory,
        open_stage(Path(directory), timing=timing, scale=1.0, extra=production) as stage,
    ):
        return [
            Figure("start after a kill to the first claim", _worst(stage, _kill_to_claim), "s", "<= 3"),
            Figure("killed worker's job, claimed by it again", _worst(stage, _offered_again), "s", "<= 3"),
            Figure("cancel to tree gone, SIGTERM ignored", _worst(stage, _cancelled), "s", tree_gone),
            Figure("lost lease to tree gone, SIGTERM ignored", _worst(stage, _fenced), "s", tree_gone),
            Figure(
                "dead worker to its job offered elsewhere, after the lease",
                _worst(stage, _offered_elsewhere) - LEASE_S,
                "s",
                "<= 1",
            ),
        ]


def _worst(stage: Stage, turn: Callable[[Stage], float]) -> float:
    return max(turn(stage) for _ in range(TURNS))


def _kill_to_claim(stage: Stage) -> float:
    """A job waits; from the start of the process to the claim's arrival."""
    stage.worker.kill()
    job_id = stage.queue()
    first = len(stage.network.requests)
    start_s = time.monotonic()
    stage.worker.start()
    claim = stage.network.wait_for(lambda request: request.kind == "claim", 60, since=first)
    stage.server.wait_until_final(job_id, 60)
    return claim.at_s - start_s


def _offered_again(stage: Stage) -> float:
    """A job runs; from the start of the next process to the claim of the same job."""
    job_id = stage.run_until_progress(then="hang")
    stage.worker.kill()
    first = len(stage.network.requests)
    start_s = time.monotonic()
    stage.worker.start()
    claim = stage.network.wait_for(lambda r: r.kind == "claim" and r.job_id == job_id, 60, since=first)
    _end(stage, job_id)
    return claim.at_s - start_s


def _cancelled(stage: Stage) -> float:
    job_id = stage.run_until_progress(then="ignore_sigterm")
    family = stage.worker.tree()
    start_s = time.monotonic()
    stage.server.cancel(job_id)
    psutil.wait_procs(family, timeout=60)
    gone_s = time.monotonic()
    stage.server.wait_until_final(job_id, 60)
    return gone_s - start_s


def _fenced(stage: Stage) -> float:
    """The worker is cut off until another has the job; from the moment that the network is back."""
    job_id = stage.run_until_progress(then="ignore_sigterm")
    family = stage.worker.tree()
    other = Talker(stage.server, "stub")
    with stage.network.all_requests(drop_request):
        while not any(job["job_id"] == job_id for job in other.poll(wait=1)):
            pass
        other.finish(job_id, other.take(job_id), "completed", result={})
    start_s = time.monotonic()
    psutil.wait_procs(family, timeout=60)
    return time.monotonic() - start_s


def _offered_elsewhere(stage: Stage) -> float:
    """From the last word of a killed daemon to the offer of its job to another worker."""
    job_id = stage.run_until_progress(then="hang")
    other = Talker(stage.server, "stub")
    stage.worker.kill()
    last_s = stage.network.requests[-1].at_s
    while not any(job["job_id"] == job_id for job in other.poll(wait=1)):
        pass
    offered_s = time.monotonic()
    other.finish(job_id, other.take(job_id), "completed", result={})
    stage.worker.start()
    return offered_s - last_s


def _end(stage: Stage, job_id: str) -> None:
    stage.server.cancel(job_id)
    stage.server.wait_until_final(job_id, 60)
