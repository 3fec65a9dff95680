"""Places of a lane, and the GPUs that go with them."""

from __future__ import annotations

import pytest

from rvmcv_worker.slots import Slots


def test_a_cpu_has_places_without_gpus() -> None:
    slots = Slots([(), ()])
    assert (slots.gpus, slots.free(), slots.gpus_free()) == (0, 2, 0)
    assert [slots.take(), slots.take(), slots.take()] == [(), (), None]
    slots.give_back(())
    assert slots.free() == 1


def test_two_jobs_side_by_side_have_a_gpu_each() -> None:
    slots = Slots([(0,), (1,)])
    assert {slots.take(), slots.take()} == {(0,), (1,)}
    assert slots.take() is None
    assert slots.gpus_free() == 0


def test_a_job_takes_several_gpus_and_gives_each_back() -> None:
    slots = Slots([(0,), (1,), (2,)])
    assert slots.take(2) == (0, 1)
    assert slots.take(2) is None
    assert slots.take() == (2,)
    slots.give_back((0, 1))
    assert slots.gpus_free() == 2
    assert slots.take() == (0,)


def test_several_gpus_are_different_ones_where_jobs_share_them() -> None:
    slots = Slots([(0,), (1,), (0,), (1,)])
    assert (slots.gpus, slots.free(), slots.gpus_free()) == (2, 4, 2)
    assert slots.take(2) == (0, 1)
    assert slots.take(2) == (0, 1)
    assert slots.take() is None


@pytest.mark.parametrize("places", [[(0,)], [()]])
def test_more_gpus_than_there_are_are_never_to_be_had(places: list[tuple[int, ...]]) -> None:
    slots = Slots(places)
    assert slots.take(2) is None
    assert slots.free() == 1


def test_a_gpu_that_is_unfit_is_given_to_nobody() -> None:
    unfit: set[int] = set()
    slots = Slots([(0,), (1,)], lambda: unfit)
    unfit.add(0)
    assert (slots.free(), slots.gpus_free(), slots.gpus) == (1, 1, 2)
    assert slots.take(2) is None
    assert slots.take() == (1,)
    assert not slots.wait(0)
    unfit.clear()
    assert slots.wait(0)
    assert slots.take() == (0,)


def test_a_gpu_that_comes_late_brings_its_place() -> None:
    slots = Slots([])
    assert slots.take() is None
    slots.add([(0,), (1,)])
    assert slots.gpus == 2
    assert slots.take(2) == (0, 1)


def test_a_job_of_several_gpus_is_waited_for_until_all_of_them_are_free() -> None:
    unfit: set[int] = set()
    slots = Slots([(0,), (1,), (0,), (1,)], lambda: unfit)
    assert [slots.take(), slots.take(), slots.take()] == [(0,), (1,), (0,)]
    assert (slots.wait(0), slots.wait(0, gpus=2)) == (True, False)
    slots.give_back((0,))
    assert slots.wait(0, gpus=2)
    assert slots.gpus_fit() == 2
    unfit.add(1)
    assert (slots.gpus_fit(), slots.wait(0, gpus=2), slots.take(2)) == (1, False, None)
