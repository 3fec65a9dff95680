from __future__ import annotations

import pytest

from rvmcv_worker.jobs.memory_ladder import Rung, smallest_imgsz


def _down(rung: Rung, smallest: int) -> list[tuple[int, int]]:
    seen = []
    current: Rung | None = rung
    while current := current.below(smallest):
        seen.append((current.batch, current.imgsz))
    return seen


def test_the_batch_goes_down_to_one_and_then_no_further() -> None:
    assert _down(Rung(12, 640), smallest_imgsz(640, may_shrink=False)) == [(6, 640), (3, 640), (1, 640)]


def test_smaller_images_come_after_the_smallest_batch_and_end_at_half() -> None:
    assert _down(Rung(2, 640), smallest_imgsz(640, may_shrink=True)) == [(1, 640), (1, 480), (1, 352)]
    assert _down(Rung(1, 32), smallest_imgsz(32, may_shrink=True)) == []


@pytest.mark.parametrize(
    ("detail", "reached"),
    [
        ({"batch": 4, "imgsz": 320}, Rung(4, 320)),
        ({"batch": 64, "imgsz": 9999}, Rung(16, 640)),
        ({"batch": 0, "imgsz": -1}, Rung(16, 640)),
        ({"batch": "4", "imgsz": True}, Rung(16, 640)),
        (None, Rung(16, 640)),
    ],
)
def test_a_child_says_how_far_it_came_down_but_never_up(detail: dict[str, object], reached: Rung) -> None:
    assert Rung(16, 640).reached(detail) == reached
