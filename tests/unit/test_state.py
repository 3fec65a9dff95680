from __future__ import annotations

from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.protocol import DesiredState, WorkerState
from rvmcv_worker.state import Condition, Lane, RunningJob


def _job(name: str = "job1") -> RunningJob:
    return RunningJob(name, "stub", Lane.TRAIN, 1, "lease", Interrupt())


def test_a_fault_keeps_its_lanes_from_claiming_until_it_is_over() -> None:
    condition = Condition()
    assert condition.degrade("gpu", "the GPU is gone", frozenset({Lane.TRAIN}))
    assert not condition.degrade("gpu", "the GPU is gone", frozenset({Lane.TRAIN}))
    assert not condition.claims(Lane.TRAIN)
    assert condition.claims(Lane.INFER)
    assert (condition.state(), condition.reasons()) == (WorkerState.DEGRADED, ["the GPU is gone"])
    assert condition.recover("gpu")
    assert condition.claims(Lane.TRAIN)


def test_a_lane_may_find_out_by_claiming_that_its_fault_is_over() -> None:
    condition = Condition()
    condition.degrade("token", "rejected")
    assert not condition.claims(Lane.TRAIN)
    assert condition.claims(Lane.TRAIN, despite="token")


def test_drain_hands_back_what_runs_and_pause_does_not() -> None:
    condition, job = Condition(), _job()
    condition.started(job)
    condition.want(DesiredState.PAUSE)
    assert (condition.state(), job.interrupt.reason) == (WorkerState.PAUSED, None)
    assert not condition.claims(Lane.TRAIN)
    condition.want(DesiredState.DRAIN)
    assert (condition.state(), job.interrupt.reason) == (WorkerState.DRAINING, StopReason.WORKER_STOPPED)
    condition.ended(job, "queued")
    condition.want(DesiredState.RUN)
    assert condition.claims(Lane.TRAIN)


def test_totals_count_ends_by_kind() -> None:
    condition = Condition()
    for name, status in (("a", "completed"), ("b", "completed"), ("c", "failed"), ("d", "fenced")):
        job = _job(name)
        condition.started(job)
        condition.ended(job, status)
    totals = condition.totals(outbox=2)
    assert (totals.completed, totals.failed, totals.running, totals.outbox) == (2, 1, 0, 2)
    assert totals.success_rate == 0.667
    assert condition.wait_idle(0)


def test_each_change_wakes_the_heartbeat() -> None:
    condition, job = Condition(), _job()
    for change in (
        lambda: condition.started(job),
        lambda: condition.ended(job, "completed"),
        lambda: condition.degrade("disk", "full"),
        lambda: condition.recover("disk"),
        lambda: condition.want(DesiredState.PAUSE),
    ):
        condition.changed.clear()
        change()
        assert condition.changed.is_set()
