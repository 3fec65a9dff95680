from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from rvmcv_worker.in_order import in_order


def test_results_come_in_order_though_the_first_is_the_last_to_be_done() -> None:
    last_done = threading.Event()

    def call(number: int) -> int:
        if number == 0:
            assert last_done.wait(10)
        if number == 7:
            last_done.set()
        return number * number

    assert list(in_order(call, range(20), threads=4)) == [number * number for number in range(20)]


def test_no_more_is_begun_than_may_be_ahead() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            asked.append(number)
            yield number

    with contextlib.closing(in_order(lambda number: number, items(), threads=3)) as results:
        assert next(results) == 0
        assert len(asked) <= 6


def test_what_a_call_raises_comes_in_its_place_and_ends_all() -> None:
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        if number == 5:
            raise ValueError("the fifth")
        return number

    results = in_order(call, range(1000), threads=2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="the fifth"):
        next(results)
    assert len(begun) <= 11
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch-image")]
