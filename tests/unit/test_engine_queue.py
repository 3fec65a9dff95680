"""Who is next in an engine, and who goes together, by a clock that only the test moves."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from rvmcv_worker.compute.engine_queue import Decoded, EngineQueue
from rvmcv_worker.engine_wire import Backend, Model, Queue, Request

BATCH, INTERACTIVE = Queue.BATCH, Queue.INTERACTIVE
MODEL = Model("0" * 64, "in/model.pt", Backend("torch-cpu", "fp32"))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Driven:
    """A queue, driven as the engine's threads drive it, one step at a time."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.queue = EngineQueue(**{"ahead": 2, "clock": self.clock, **options})

    def put(self, *requests: tuple[int, Queue]) -> None:
        for number, queue in requests:
            self.queue.put(Request(number, queue, MODEL), b"encoded")

    def decode(self, width: int = 64) -> int | None:
        """Decode the next request and return its number, if one may be decoded."""
        encoded = self.queue.pick_encoded()
        if encoded is None:
            return None
        image = np.zeros((48, width, 3), np.uint8)
        self.queue.put_decoded(Decoded(encoded.request, image, "key", 0.0, 0.0, self.clock()))
        return encoded.request.id

    def batch(self) -> list[int]:
        return [item.request.id for item in self.queue.pick_batch(lambda item: item.size)[0]]

    def wait_s(self) -> float | None:
        batch, wait_s = self.queue.pick_batch(lambda item: item.size)
        assert batch == []
        return wait_s


def test_interactive_requests_go_first_at_both_stages_and_else_in_their_order() -> None:
    driven = Driven(ahead=9)
    driven.put((1, BATCH), (2, BATCH), (3, INTERACTIVE), (4, INTERACTIVE))
    assert [driven.decode() for _ in range(3)] == [3, 4, 1]
    driven.put((5, INTERACTIVE))
    assert [driven.decode() for _ in range(3)] == [5, 2, None]
    assert [driven.batch() for _ in range(6)] == [[3], [4], [5], [1], [2], []]


def test_two_images_of_a_queue_are_decoded_ahead_and_a_batch_leaves_room_for_interactive_ones() -> None:
    driven = Driven()
    driven.put(*((number, BATCH) for number in range(5)))
    assert [driven.decode() for _ in range(3)] == [0, 1, None]
    driven.put(*((number, INTERACTIVE) for number in range(10, 14)))
    assert [driven.decode() for _ in range(3)] == [10, 11, None]
    assert driven.batch() == [10]
    assert [driven.decode() for _ in range(2)] == [12, None]


def test_a_request_that_ends_while_it_is_decoded_leaves_its_room() -> None:
    driven = Driven(ahead=1)
    driven.put((1, BATCH), (2, BATCH))
    assert driven.queue.pick_encoded() is not None
    driven.queue.put_decoded(None)
    assert driven.decode() == 2
    assert driven.batch() == [2]


def test_on_a_cpu_equal_images_go_one_by_one_and_wait_for_nothing() -> None:
    driven = Driven(ahead=4, window_s=1.0)
    driven.put((1, BATCH), (2, BATCH), (3, BATCH))
    assert [driven.decode() for _ in range(2)] == [1, 2]
    assert [driven.batch() for _ in range(2)] == [[1], [2]]


def on_gpu(**options: Any) -> Driven:
    return Driven(**{"ahead": 4, "max_batch": 4, "window_s": 0.003, **options})


def test_on_a_gpu_equal_images_go_together_and_the_others_stay_in_their_order() -> None:
    driven = on_gpu()
    driven.put(*((number, BATCH) for number in range(4)))
    assert [driven.decode(width) for width in (64, 32, 64, 32)] == [0, 1, 2, 3]
    assert driven.batch() == [0, 2]
    assert driven.batch() == [1, 3]


def test_a_gpu_batch_is_as_large_as_it_may_be() -> None:
    driven = on_gpu(ahead=9)
    driven.put(*((number, BATCH) for number in range(6)))
    for _ in range(6):
        driven.decode()
    assert driven.batch() == [0, 1, 2, 3]
    assert driven.batch() == [4, 5]


def test_interactive_and_batch_images_do_not_go_together() -> None:
    driven = on_gpu()
    driven.put((1, BATCH), (2, INTERACTIVE))
    driven.decode(), driven.decode()
    assert [driven.batch(), driven.batch()] == [[2], [1]]


def test_nothing_waits_for_company_while_the_queue_is_empty() -> None:
    driven = on_gpu()
    driven.put((1, BATCH))
    driven.decode()
    assert driven.batch() == [1]


def test_an_image_waits_for_company_that_is_on_its_way_but_not_longer_than_the_window() -> None:
    driven = on_gpu()
    driven.put((1, BATCH), (2, BATCH))
    driven.decode()
    assert driven.wait_s() == pytest.approx(0.003)
    driven.clock.now_s += 0.002
    assert driven.wait_s() == pytest.approx(0.001)
    driven.clock.now_s += 0.001
    assert driven.batch() == [1]


def test_an_image_waits_for_one_that_is_just_being_decoded() -> None:
    driven = on_gpu()
    driven.put((1, BATCH), (2, BATCH))
    driven.decode()
    assert driven.queue.pick_encoded() is not None
    assert driven.wait_s() == pytest.approx(0.003)
    driven.queue.put_decoded(None)
    assert driven.batch() == [1]


def test_requests_of_the_other_queue_are_no_company_to_wait_for() -> None:
    driven = on_gpu()
    driven.put((1, INTERACTIVE))
    driven.decode()
    driven.put((2, BATCH))
    assert driven.batch() == [1]


def test_an_image_does_not_wait_where_no_other_can_be_decoded_beside_it() -> None:
    driven = on_gpu(ahead=2)
    driven.put(*((number, BATCH) for number in range(3)))
    driven.decode(64), driven.decode(32)
    assert driven.batch() == [0]


def test_an_interactive_image_ends_the_wait_of_a_batch() -> None:
    driven = on_gpu()
    driven.put((1, BATCH), (2, BATCH))
    driven.decode()
    assert driven.wait_s() is not None
    driven.put((3, INTERACTIVE))
    assert driven.decode() == 3
    assert driven.batch() == [3]


def test_threads_that_wait_are_woken_by_what_they_wait_for() -> None:
    queue = EngineQueue(ahead=1)
    served: list[int] = []

    def decode() -> None:
        for _ in range(100):
            request = queue.take_encoded().request
            queue.put_decoded(Decoded(request, np.zeros((1, 1, 3), np.uint8), "", 0.0, 0.0, queue.clock()))

    def compute() -> None:
        while len(served) < 100:
            served.extend(item.request.id for item in queue.take_batch(lambda item: item.size))

    threads = [threading.Thread(target=work, daemon=True) for work in (decode, compute)]
    for thread in threads:
        thread.start()
    for number in range(100):
        queue.put(Request(number, BATCH, MODEL), b"")
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert served == list(range(100))


def test_of_large_images_few_are_decoded_ahead_and_none_waits_for_room_that_does_not_come() -> None:
    driven = Driven(ahead=16, max_batch=16, window_s=0.003, ahead_bytes=3 * 48 * 1000)
    driven.put(*((number, BATCH) for number in range(1, 6)), (6, INTERACTIVE))
    assert [driven.decode(width=600) for _ in range(4)] == [6, 1, 2, None]
    assert driven.batch() == [6]
    assert driven.batch() == [1, 2]
    assert [driven.decode(width=600) for _ in range(3)] == [3, 4, None]
