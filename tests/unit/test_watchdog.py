from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rvmcv_worker import systemd
from rvmcv_worker.errands import Errands
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.protocol import DesiredState
from rvmcv_worker.state import Condition, Lane, RunningJob
from rvmcv_worker.status_line import status_line
from rvmcv_worker.tick import Tick

SERVER = "https://vm100"


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The end of the socket where systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def test_each_tick_feeds_and_a_line_is_told_when_it_is_another(manager: socket.socket) -> None:
    feeder = systemd.Feeder()
    feeder.feed("waits", "READY=1")
    feeder.feed("waits")
    feeder.feed("runs")
    assert [manager.recv(1000).decode() for _ in range(3)] == [
        "READY=1\nWATCHDOG=1\nSTATUS=waits",
        "WATCHDOG=1",
        "WATCHDOG=1\nSTATUS=runs",
    ]


def test_a_manager_that_takes_nothing_holds_up_no_tick(manager: socket.socket) -> None:
    manager.setblocking(False)
    for _ in range(1000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filling:
            filling.setblocking(False)
            filling.connect(manager.getsockname())
            try:
                filling.send(b"x")
            except BlockingIOError:
                break
    else:
        pytest.fail("its queue never was full")
    tick = Tick()
    systemd.notify("WATCHDOG=1")
    assert tick.age_s() < 5


def test_a_manager_that_is_gone_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    systemd.notify("WATCHDOG=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    systemd.notify("WATCHDOG=1")


def test_a_tick_grows_old_until_it_is_beaten_again() -> None:
    tick = Tick()
    never = threading.Event()
    never.wait(0.05)
    old_s = tick.age_s()
    assert old_s >= 0.05
    tick.beat()
    assert tick.age_s() < old_s


def test_errands_are_done_in_order_beside_who_gives_them_and_a_fault_ends_nothing(logged: list[str]) -> None:
    errands, go, done, order = Errands(), threading.Event(), threading.Event(), []
    errands.start()
    errands.do(lambda: go.wait(10))  # a disk that takes its time
    errands.do(lambda: order.append(1 // 0))
    errands.do(lambda: order.append("second"))
    errands.do(done.set)
    assert order == []
    go.set()
    assert done.wait(10)
    assert order == ["second"]
    assert any("it goes on" in line for line in logged)


def _job(number: int) -> RunningJob:
    return RunningJob(f"train_{number}", "yolo11", Lane.TRAIN, 1, "token", Interrupt())


def test_the_line_says_what_runs_and_what_keeps_the_worker() -> None:
    condition = Condition()
    assert status_line(condition, SERVER).startswith("degraded: what the daemon before left")
    condition.settled.set()
    assert status_line(condition, SERVER) == f"waits for jobs of {SERVER}"
    jobs = [_job(number) for number in range(3)]
    for job in jobs:
        condition.started(job)
    assert status_line(condition, SERVER) == "runs train_0, train_1 and 1 more"
    condition.wish(DesiredState.PAUSE)
    assert status_line(condition, SERVER).endswith("; paused: nothing is claimed")
    condition.degrade("disk", "the disk\nis full")
    condition.degrade("token", "rejected")
    assert status_line(condition, SERVER).endswith(
        "; degraded: the disk is full (and 1 more: rvmcv-worker status)"
    )
    condition.recover("token")
    condition.degrade("disk", "\x1b[2J \ud800")  # half a character: no bytes are that
    assert status_line(condition, SERVER).endswith("; degraded: \\x1b[2J \\ud800")
    condition.degrade("disk", "x" * 1000)
    assert len(status_line(condition, SERVER)) == 300
    condition.stop("a test")
    assert status_line(condition, SERVER).endswith("; stops")
