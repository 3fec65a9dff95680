from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.protocol import DesiredState, WorkerState
from rvmcv_worker.state import SETTLEMENT, Condition, Lane, RunningJob


def _settled() -> Condition:
    condition = Condition()
    condition.settled.set()
    return condition


def _job(name: str = "job1", lane: Lane = Lane.TRAIN) -> RunningJob:
    return RunningJob(name, "stub", lane, 1, "lease", Interrupt())


def test_nothing_is_claimed_before_the_daemon_before_is_settled() -> None:
    condition = Condition()
    assert not any(condition.claims(lane) for lane in Lane)
    assert condition.state() is WorkerState.DEGRADED
    assert "not settled yet: nothing is claimed" in condition.reasons()[0]
    condition.degrade(SETTLEMENT, "a claim is unsettled, nothing is claimed: away", frozenset())
    assert condition.reasons() == ["a claim is unsettled, nothing is claimed: away"], "the better sentence"
    assert not condition.claims(Lane.TRAIN)
    condition.recover(SETTLEMENT)
    assert condition.state() is WorkerState.DEGRADED
    condition.settled.set()
    assert (condition.state(), condition.reasons()) == (WorkerState.READY, [])
    assert condition.claims(Lane.TRAIN)


def test_a_fault_keeps_its_lanes_from_claiming_until_it_is_over() -> None:
    condition = _settled()
    assert condition.degrade("gpu", "the GPU is gone", frozenset({Lane.TRAIN}))
    assert not condition.degrade("gpu", "the GPU is gone", frozenset({Lane.TRAIN}))
    assert not condition.claims(Lane.TRAIN)
    assert condition.claims(Lane.INFER)
    assert (condition.state(), condition.reasons()) == (WorkerState.DEGRADED, ["the GPU is gone"])
    assert condition.recover("gpu")
    assert condition.claims(Lane.TRAIN)


def test_a_lane_may_find_out_by_claiming_that_its_fault_is_over() -> None:
    condition = _settled()
    condition.degrade("token", "rejected")
    assert not condition.claims(Lane.TRAIN)
    assert condition.claims(Lane.TRAIN, despite="token")


def test_drain_hands_back_what_runs_and_pause_does_not() -> None:
    condition, job = _settled(), _job()
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
    condition = _settled()
    for name, status in (("a", "completed"), ("b", "completed"), ("c", "failed"), ("d", "fenced")):
        job = _job(name)
        condition.started(job)
        condition.ended(job, status)
    totals = condition.totals(outbox=2)
    assert (totals.completed, totals.failed, totals.running, totals.outbox) == (2, 1, 0, 2)
    assert totals.success_rate == 0.667
    assert condition.wait_idle(0)


def test_each_change_wakes_the_heartbeat() -> None:
    condition, job = _settled(), _job()
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


@pytest.mark.parametrize("server", list(DesiredState))
@pytest.mark.parametrize("operator", list(DesiredState))
def test_the_stricter_wish_holds_whoever_wishes_first(server: DesiredState, operator: DesiredState) -> None:
    order = [DesiredState.RUN, DesiredState.PAUSE, DesiredState.DRAIN]
    stricter = order[max(order.index(server), order.index(operator))]
    for first_server in (True, False):
        condition, job = _settled(), _job()
        condition.started(job)
        for is_server in (first_server, not first_server):
            (condition.want if is_server else condition.wish)(server if is_server else operator)
        assert condition.wishes().holds is stricter
        assert condition.claims(Lane.TRAIN) == (stricter is DesiredState.RUN)
        assert (job.interrupt.reason is None) == (stricter is not DesiredState.DRAIN)


def test_a_resume_leaves_the_servers_wish() -> None:
    condition = _settled()
    condition.want(DesiredState.PAUSE)
    condition.wish(DesiredState.DRAIN)
    condition.wish(DesiredState.RUN)
    assert (condition.wishes().holds, condition.state()) == (DesiredState.PAUSE, WorkerState.PAUSED)


def test_held_polls_are_let_go_once_when_claims_stop() -> None:
    condition, calls = _settled(), []
    condition.on_hold = lambda: calls.append(condition.wishes().holds)
    condition.want(DesiredState.PAUSE)
    condition.want(DesiredState.PAUSE)
    condition.wish(DesiredState.PAUSE)
    assert calls == [DesiredState.PAUSE]
    condition.want(DesiredState.RUN)
    condition.wish(DesiredState.RUN)
    assert calls == [DesiredState.PAUSE]


def test_a_note_informs_and_is_no_fault() -> None:
    condition = _settled()
    assert condition.note("storage", "no storage")
    assert not condition.note("storage", "no storage")
    condition.degrade("gpu", "the GPU is gone", frozenset())
    assert condition.reasons() == ["the GPU is gone", "no storage"]
    condition.recover("gpu")
    assert (condition.state(), condition.claims(Lane.TRAIN)) == (WorkerState.READY, True)
    assert condition.note("storage", None)
    assert condition.reasons() == []


@pytest.mark.parametrize(
    "wake",
    [
        lambda condition: condition.wake(),
        lambda condition: condition.recover("token"),
        lambda condition: condition.wish(DesiredState.RUN),
        lambda condition: condition.stop("a test"),
    ],
)
def test_who_rests_is_woken_even_when_the_news_came_before(wake: Callable[[Condition], object]) -> None:
    condition = _settled()
    condition.degrade("token", "rejected")
    condition.wish(DesiredState.PAUSE)
    mark = condition.mark()
    wake(condition)
    start_s = time.monotonic()
    assert condition.rest(60.0, mark) == condition.stopping.is_set()
    mark = condition.mark()
    threading.Timer(0.05, wake, [condition]).start()
    if not condition.stopping.is_set():  # the others are no news the second time
        condition.degrade("token", "rejected")
        condition.wish(DesiredState.PAUSE)
        mark = condition.mark()
    condition.rest(60.0, mark)
    assert time.monotonic() - start_s < 30


def test_the_last_ends_are_kept_newest_first() -> None:
    condition = _settled()
    for number in range(12):
        job = _job(f"job{number}")
        condition.started(job)
        condition.ended(job, "failed", "dataset_invalid")
    ends = condition.last_ends()
    assert [end.job_id for end in ends] == [f"job{number}" for number in range(11, 1, -1)]
    assert (ends[0].status, ends[0].error_code) == ("failed", "dataset_invalid")


def test_the_end_of_a_training_is_known_however_many_inferences_end_after_it() -> None:
    condition = _settled()
    jobs = [_job("training"), *(_job(f"inference{number}", Lane.INFER) for number in range(50))]
    for job in jobs:
        condition.started(job)
        condition.ended(job, "cancelled")
    end = condition.end_of("training")
    assert end is not None
    assert end.status == "cancelled"
    assert condition.end_of("inference39") is None
    assert [end.job_id for end in condition.last_ends()] == [f"inference{n}" for n in range(49, 39, -1)]
