from __future__ import annotations

from rvmcv_worker.progress import merged


def _epochs(*numbers: int) -> list[dict[str, object]]:
    return [{"epoch": number} for number in numbers]


def test_new_epochs_follow_those_that_wait() -> None:
    assert merged(_epochs(1, 2), _epochs(3)) == _epochs(1, 2, 3)
    assert merged(_epochs(1, 2), []) == _epochs(1, 2)


def test_an_epoch_told_again_takes_back_what_came_after_it() -> None:
    assert merged(_epochs(3, 4, 5), _epochs(2, 3)) == _epochs(2, 3)
    assert merged([{"note": 1}, *_epochs(3, 4)], _epochs(4)) == [{"note": 1}, *_epochs(3, 4)]
