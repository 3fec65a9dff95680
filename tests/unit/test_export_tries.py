"""An export is made once, one that failed again later, and never without end."""

from __future__ import annotations

import pytest

from rvmcv_worker.errors import JobCrashedError, ModelInvalidError, TimedOutError, UnsupportedJobError
from rvmcv_worker.export_tries import MAX_OF_A_MODEL, MAX_WAITING, ExportTries
from rvmcv_worker.model_exports import Key

NOW_S = 1000.0


def key(model: int = 1, imgsz: int = 640) -> Key:
    return Key(f"{model:064x}", "a CPU", imgsz, ("openvino", "torch-cpu"), {"torch": "2.15"})


def test_it_is_made_once() -> None:
    tries = ExportTries()
    assert tries.begin(key(), NOW_S)
    assert not tries.begin(key(), NOW_S)
    tries.end(key())
    assert not tries.begin(key(), NOW_S + 1e9)


def test_what_failed_is_tried_again_later_and_later() -> None:
    tries, now_s, pauses = ExportTries(), NOW_S, []
    for _ in range(12):
        assert tries.begin(key(), now_s)
        tries.fail(key(), JobCrashedError("killed"), now_s)
        pause_s = next(pause for pause in range(0, 200_000, 300) if tries.begin(key(), now_s + pause))
        tries.fail(key(), JobCrashedError("counted twice, as it was begun twice"), now_s)
        pauses.append(pause_s)
        now_s += 1e6
    assert pauses[0] == 600
    assert pauses == sorted(pauses)
    assert pauses[-1] == 24 * 3600


@pytest.mark.parametrize("error", [ModelInvalidError, UnsupportedJobError, TimedOutError])
def test_what_would_only_fail_again_is_not_tried_again(error: type[Exception]) -> None:
    tries = ExportTries()
    assert tries.begin(key(), NOW_S)
    tries.fail(key(), error("no"), NOW_S)
    assert not tries.begin(key(), NOW_S + 1e9)


def test_of_a_model_only_some_sizes_are_exported() -> None:
    tries = ExportTries()
    begun = []
    for imgsz in range(32, 2049, 32):
        if tries.begin(key(imgsz=imgsz), NOW_S):
            begun.append(imgsz)
            tries.end(key(imgsz=imgsz))
    assert len(begun) == MAX_OF_A_MODEL
    assert tries.begin(key(model=2), NOW_S)


def test_only_so_many_wait_and_who_was_sent_away_may_come_again() -> None:
    tries = ExportTries()
    begun = [model for model in range(100) if tries.begin(key(model), NOW_S)]
    assert len(begun) == MAX_WAITING
    assert tries.begin(key(200), NOW_S, approved=True)
    tries.end(key(200))
    tries.end(key(0))
    assert tries.begin(key(99), NOW_S)


def test_what_is_remembered_is_bounded() -> None:
    tries = ExportTries()
    for model in range(5000):
        assert tries.begin(key(model), NOW_S)
        tries.end(key(model))
    assert len(tries._tries) == 1000
