from __future__ import annotations

import os
import select

import pytest

from rvmcv_worker.errors import FencedError, JobCancelledError, WorkerStoppedError
from rvmcv_worker.interrupt import Interrupt, StopReason


@pytest.mark.parametrize(
    ("reason", "raised"),
    [
        (StopReason.CANCELLED, JobCancelledError),
        (StopReason.FENCED, FencedError),
        (StopReason.WORKER_STOPPED, WorkerStoppedError),
    ],
)
def test_each_reason_raises_its_own(reason: StopReason, raised: type[Exception]) -> None:
    interrupt = Interrupt()
    interrupt.check()
    interrupt.request(reason, "why")
    with pytest.raises(raised):
        interrupt.check()
    assert interrupt.wait(0)
    assert select.select([interrupt.fileno()], [], [], 0)[0]


def test_the_first_reason_stays_unless_fenced() -> None:
    interrupt = Interrupt()
    interrupt.request(StopReason.CANCELLED)
    interrupt.request(StopReason.WORKER_STOPPED)
    assert interrupt.reason is StopReason.CANCELLED
    interrupt.request(StopReason.FENCED)
    assert interrupt.reason is StopReason.FENCED


def test_a_wish_that_comes_after_the_end_touches_nobody() -> None:
    interrupt = Interrupt()
    interrupt.close()
    reader, writer = os.pipe2(os.O_NONBLOCK)  # takes the number that was given back
    interrupt.request(StopReason.FENCED, "too late")
    interrupt.close()
    with pytest.raises(BlockingIOError):
        os.read(reader, 8)
    assert interrupt.reason is None
    os.close(reader)
    os.close(writer)


def test_what_waits_is_called_at_the_first_wish_and_at_once_when_that_came_before() -> None:
    interrupt, called = Interrupt(), []
    gone = lambda: called.append("gone")  # noqa: E731 - compared by identity
    interrupt.call(lambda: called.append("early"))
    interrupt.call(gone)
    interrupt.call_no_more(gone)
    assert called == []
    interrupt.request(StopReason.CANCELLED)
    interrupt.call(lambda: called.append("late"))
    assert called == ["early", "late"]
    interrupt.close()
