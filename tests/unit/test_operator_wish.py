from __future__ import annotations

from pathlib import Path

import pytest

from rvmcv_worker.operator_wish import FILE_NAME, OperatorWish
from rvmcv_worker.protocol import DesiredState
from rvmcv_worker.state import Condition, Lane


def _restored(state_dir: Path) -> DesiredState:
    condition = Condition()
    OperatorWish(state_dir, condition).restore()
    return condition.wishes().operator


def test_a_wish_is_followed_and_survives_a_restart_until_it_is_taken_back(tmp_path: Path) -> None:
    condition = Condition()
    condition.settled.set()
    wish = OperatorWish(tmp_path, condition)
    assert _restored(tmp_path) is DesiredState.RUN
    for desired in (DesiredState.PAUSE, DesiredState.DRAIN, DesiredState.RUN):
        wish.set(desired, by="a test")
        assert condition.claims(Lane.TRAIN) == (desired is DesiredState.RUN)
        assert _restored(tmp_path) is desired
    assert list(tmp_path.iterdir()) == []


def test_a_toggle_pauses_what_runs_and_resumes_the_rest(tmp_path: Path) -> None:
    wish = OperatorWish(tmp_path, Condition())
    seen = []
    for _ in range(2):
        wish.toggle_pause(by="a test")
        seen.append(_restored(tmp_path))
    wish.set(DesiredState.DRAIN, by="a test")
    wish.toggle_pause(by="a test")
    assert [*seen, _restored(tmp_path)] == [DesiredState.PAUSE, DesiredState.RUN, DesiredState.RUN]


@pytest.mark.parametrize("text", ["", "halt\n", "\x00" * 5])
def test_a_wish_that_cannot_be_read_pauses_and_says_so(tmp_path: Path, logged: list[str], text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    assert _restored(tmp_path) is DesiredState.PAUSE
    assert any(line.startswith("ERROR") and FILE_NAME in line and "resume" in line for line in logged)


def test_a_wish_that_cannot_be_written_is_followed_and_told(tmp_path: Path) -> None:
    condition = Condition()
    wish = OperatorWish(tmp_path / "gone", condition)
    with pytest.raises(OSError, match="No such file"):
        wish.set(DesiredState.DRAIN, by="a test")
    assert condition.wishes().operator is DesiredState.DRAIN
