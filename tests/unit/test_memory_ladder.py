"""What a training tries next when the GPU's memory did not hold it."""

from __future__ import annotations

import pytest

from rvmcv_worker.jobs.memory_ladder import Rung, smallest_imgsz


def rungs(
    batch: int, imgsz: int, *, may_shrink: bool = False, smallest_batch: int = 1
) -> list[tuple[int, int]]:
    """Return every rung from the first to the last."""
    rung: Rung | None = Rung(batch, imgsz)
    smallest, found = smallest_imgsz(imgsz, may_shrink=may_shrink), []
    while rung:
        found.append((rung.batch, rung.imgsz))
        rung = rung.below(smallest, smallest_batch=smallest_batch)
    return found


def test_the_batch_is_halved_down_to_one() -> None:
    assert rungs(12, 640) == [(12, 640), (6, 640), (3, 640), (1, 640)]


def test_then_the_size_where_the_job_allows_it() -> None:
    assert rungs(2, 640, may_shrink=True) == [(2, 640), (1, 640), (1, 480), (1, 352)]
    assert rungs(1, 32, may_shrink=True) == [(1, 32)]


def test_each_of_several_gpus_keeps_a_picture() -> None:
    assert rungs(6, 640, smallest_batch=2) == [(6, 640), (3, 640), (2, 640)]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"batch": 4, "imgsz": 320}, Rung(4, 320)),
        ({"batch": 64, "imgsz": 4096}, Rung(16, 640)),
        ({"batch": "4", "imgsz": True}, Rung(16, 640)),
        ({"batch": 0}, Rung(16, 640)),
        (None, Rung(16, 640)),
    ],
)
def test_a_childs_word_can_only_make_it_less(said: dict[str, object] | None, expected: Rung) -> None:
    assert Rung(16, 640).reached(said) == expected
