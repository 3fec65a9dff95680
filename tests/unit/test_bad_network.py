"""The bad network counts what it let through, and draws the same for the same seed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import requests

from tests.bad_network import BadNetwork
from tests.network_faults import Dice, Request, drop_answer, duplicate, says


@pytest.fixture
def network() -> Iterator[BadNetwork]:
    """A network to a server that accepts each final report, however often one came before."""
    with BadNetwork("http://127.0.0.1:9") as server, BadNetwork(server.url) as network:
        server.on("finish", says(200, {"accepted": True}), times=None)
        yield network


def _finish(network: BadNetwork, job_id: str, finish_id: str, status: str = "completed") -> None:
    body = {"event": "finish", "job_id": job_id, "finish_id": finish_id, "status": status}
    with contextlib.suppress(requests.ConnectionError):
        requests.post(f"{network.url}/api/v1/cv/job-status", json=body, timeout=5)


def test_a_job_that_was_accepted_twice_is_seen_although_nobody_heard_of_it(network: BadNetwork) -> None:
    network.on("finish", drop_answer, times=2)
    _finish(network, "twice", "a")
    _finish(network, "twice", "b", "failed")
    network.on("finish", duplicate)
    _finish(network, "once", "c")
    _finish(network, "once", "c")
    _finish(network, "handed-back", "d", "queued")
    assert network.accepted() == {"twice": {"a", "b"}, "once": {"c"}}


def test_dice_fall_the_same_for_the_same_seed_in_any_order() -> None:
    kinds = ["offer", "claim", "progress", "finish"] * 50

    def drawn(seed: int, order: list[str]) -> dict[str, int]:
        dice = Dice(seed, rate=0.5)
        for kind in order:
            dice.draw(Request(0, "POST", "/", {}, b"", kind, {}))
        return dict(dice.drawn)

    assert drawn(1, kinds) == drawn(1, sorted(kinds))
    assert drawn(1, kinds) != drawn(2, kinds)
    assert len(drawn(1, kinds)) == 9, "each fault comes up"
