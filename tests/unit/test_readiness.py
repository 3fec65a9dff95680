"""When a worker counts as alive and as ready."""

from __future__ import annotations

import json

import pytest

from rvmcv_worker.protocol import DesiredState, LaneClaims
from rvmcv_worker.readiness import HUNG_S, healthz, readyz
from rvmcv_worker.routes import Answer
from rvmcv_worker.state import Condition, Lane
from rvmcv_worker.tick import Tick


class _Hung(Tick):
    def age_s(self) -> float:
        return super().age_s() + HUNG_S


def _claims(condition: Condition) -> LaneClaims:
    return LaneClaims(**{lane.value: condition.claims(lane) for lane in Lane})


def _ready(condition: Condition) -> tuple[int, dict[str, object]]:
    answer = readyz(condition, _claims(condition))
    return answer.status, json.loads(answer.body)


@pytest.fixture
def condition() -> Condition:
    made = Condition()
    made.settled.set()
    return made


def _alive(answer: Answer) -> tuple[int, bool]:
    return answer.status, json.loads(answer.body)["alive"]


def test_a_main_loop_that_ticks_is_alive(condition: Condition) -> None:
    assert _alive(healthz(condition, Tick())) == (200, True)


def test_a_main_loop_that_hangs_is_not_and_its_age_is_told(condition: Condition) -> None:
    answer = healthz(condition, _Hung())
    assert _alive(answer) == (503, False)
    assert json.loads(answer.body)["tick_age_s"] >= HUNG_S


def test_a_worker_that_stops_does_not_hang(condition: Condition) -> None:
    condition.stop("the test ends")
    assert _alive(healthz(condition, _Hung())) == (200, True)


def test_it_is_not_ready_before_the_daemon_before_is_settled() -> None:
    status, body = _ready(Condition())
    assert (status, body["ready"], body["state"]) == (503, False, "degraded")
    assert body["reasons"]


def test_ready_and_busy_are_ready(condition: Condition) -> None:
    status, body = _ready(condition)
    assert (status, body["ready"], body["state"], body["reasons"]) == (200, True, "ready", [])


@pytest.mark.parametrize("wish", [DesiredState.PAUSE, DesiredState.DRAIN])
def test_a_wish_to_claim_nothing_makes_it_unready(condition: Condition, wish: DesiredState) -> None:
    condition.wish(wish)
    assert _ready(condition)[0] == 503
    condition.wish(DesiredState.RUN)
    assert _ready(condition)[0] == 200


def test_a_degraded_worker_is_ready_while_some_lane_claims(condition: Condition) -> None:
    condition.degrade("gpu", "no GPU", frozenset({Lane.TRAIN}))
    status, body = _ready(condition)
    assert (status, body["state"], body["reasons"]) == (200, "degraded", ["no GPU"])
    condition.degrade("disk", "the disk is full")
    status, body = _ready(condition)
    assert (status, body["reasons"]) == (503, ["no GPU", "the disk is full"])
