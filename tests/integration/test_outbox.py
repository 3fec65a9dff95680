"""Final reports on a disk that is full, and a last question that is refused or not answered."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker import http_session, progress
from rvmcv_worker.config import ServerSettings, Settings, TimingSettings, WorkerSettings
from rvmcv_worker.controller import Controller
from rvmcv_worker.errors import FencedError, JobCancelledError, WorkerStoppedError
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.ledger import Ledger
from rvmcv_worker.outbox import Outbox
from rvmcv_worker.progress import ProgressReporter
from rvmcv_worker.retry import Retry
from rvmcv_worker.state import Condition
from rvmcv_worker.token_source import TokenSource
from tests.file_server import FileServer, Handler, status

JOB_STATUS = "POST /api/v1/cv/job-status"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def settings(tmp_path: Path, server: FileServer) -> Settings:
    (tmp_path / "token").write_text("a-token")
    return Settings(
        server=ServerSettings(url=server.url),
        worker=WorkerSettings(state_dir=tmp_path, runtime_dir=tmp_path, credentials_dir=tmp_path),
        timing=TimingSettings(scale=0.001),
    )


@pytest.fixture
def controller(settings: Settings) -> Iterator[Controller]:
    made = Controller(settings, TokenSource(settings), "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11")
    yield made
    made.close()


def test_a_full_disk_ends_no_delivery(
    tmp_path: Path,
    server: FileServer,
    settings: Settings,
    controller: Controller,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite3")
    ledger.begin_claim("job1", "stub", "c1")
    report = {
        "event": "finish",
        "job_id": "job1",
        "lease_token": "t",
        "finish_id": "f1",
        "status": "completed",
    }
    ledger.finish("job1", {**report, "result": {}, "timings": {}})
    delivered, full = ledger.delivered, threading.Event()

    def no_room(seq: int) -> None:
        if not full.is_set():
            full.set()
            raise sqlite3.OperationalError("database or disk is full")
        delivered(seq)

    monkeypatch.setattr(ledger, "delivered", no_room)
    server.on(JOB_STATUS, *[status(200, json.dumps({"accepted": True}).encode())] * 2)
    outbox = _outbox(ledger, controller, settings, tmp_path)
    outbox.start()
    assert outbox.flush(20)
    assert outbox.is_alive()
    outbox.close()
    outbox.join(20)
    assert full.is_set()
    assert [json.loads(call.body)["finish_id"] for call in server.calls("POST")] == ["f1", "f1"]


@pytest.mark.parametrize(
    ("ended", "minimal"),
    [
        (
            {"status": "cancelled", "error": {"code": "cancelled_by_operator", "message": "x"}},
            ("cancelled", None),
        ),
        ({"status": "completed", "result": {}}, ("failed", "internal")),
    ],
)
def test_a_report_that_is_refused_is_told_once_more_in_few_words(
    tmp_path: Path,
    server: FileServer,
    settings: Settings,
    controller: Controller,
    ended: dict[str, Any],
    minimal: tuple[str, str | None],
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite3")
    ledger.begin_claim("job1", "stub", "c1")
    begun = {"event": "finish", "job_id": "job1", "lease_token": "t", "finish_id": "f1", "timings": {}}
    ledger.finish("job1", {**begun, **ended})
    server.on(JOB_STATUS, status(422), status(200, json.dumps({"accepted": True}).encode()))
    outbox = _outbox(ledger, controller, settings, tmp_path)
    outbox.start()
    assert outbox.flush(20)
    outbox.close()
    outbox.join(20)
    told = [json.loads(call.body) for call in server.calls("POST")]
    assert told[0] == {**begun, **ended}
    assert (told[1]["status"], told[1].get("error", {}).get("code")) == minimal
    assert json.loads((tmp_path / "rejected/f1.json").read_text()) == told[0]


def _outbox(ledger: Ledger, controller: Controller, settings: Settings, directory: Path) -> Outbox:
    condition = Condition()
    condition.cleared.set()
    return Outbox(ledger, controller, Retry(settings), condition, directory / "rejected")


def _reporter(
    controller: Controller, settings: Settings, interrupt: Interrupt, state: dict[str, Any] | None = None
) -> ProgressReporter:
    return ProgressReporter(
        controller,
        Retry(settings),
        job_id="job1",
        lease_token="t",
        interval_s=3600.0,
        keep_alive_s=3600.0,
        interrupt=interrupt,
        state=state,
    )


def test_a_child_that_tells_of_epochs_without_end_takes_little_memory(
    settings: Settings, controller: Controller
) -> None:
    reporter = _reporter(controller, settings, Interrupt())  # its thread is not started: nothing is told
    for first in range(0, 25_000, 1000):
        reporter.take({"history": [{"epoch": first + number} for number in range(1000)]})
    assert len(reporter._history) == progress._MAX_EPOCHS
    other = _reporter(controller, settings, Interrupt())
    other.take({"history": [{"epoch": 0, "losses": "x" * 60_000}, {"epoch": 1}]})
    assert other._history == [{"epoch": 1}]


@pytest.mark.parametrize(
    ("reason", "raised"),
    [
        (StopReason.WORKER_STOPPED, WorkerStoppedError),
        (StopReason.CANCELLED, JobCancelledError),
        (StopReason.FENCED, FencedError),
    ],
)
@pytest.mark.parametrize("behind", [False, True], ids=["itself", "behind another report"])
def test_a_question_without_an_answer_is_left_when_the_job_is_to_end(
    server: FileServer,
    settings: Settings,
    controller: Controller,
    reason: StopReason,
    raised: type[Exception],
    behind: bool,
) -> None:
    interrupt, asked = Interrupt(), threading.Event()

    def say_nothing(handler: Handler) -> None:
        asked.set()
        handler.hold()

    server.on(JOB_STATUS, say_nothing)
    reporter = _reporter(controller, settings, interrupt)
    with ThreadPoolExecutor(1) as job, reporter if behind else contextlib.nullcontext():
        if behind:  # the report of its own thread holds the turn
            assert asked.wait(20)

        def confirm() -> None:
            with http_session.ended_by(interrupt):
                reporter.confirm("upload")

        waiting = job.submit(confirm)
        assert asked.wait(20)
        interrupt.request(reason, "a test")
        with pytest.raises(raised):
            waiting.result(15)
        assert not server.held_out, "it ended only when the server let go"
    assert len(server.calls("POST")) == 1
    interrupt.close()


def test_once_its_job_is_to_end_a_thread_asks_nothing_more(
    server: FileServer, settings: Settings, controller: Controller
) -> None:
    server.on(JOB_STATUS, status(200, json.dumps({"directive": "continue"}).encode()))
    interrupt = Interrupt()
    with http_session.ended_by(interrupt):
        controller.progress("job1", "t", 1, {})
        interrupt.request(StopReason.WORKER_STOPPED, "a test")
        with pytest.raises(WorkerStoppedError):
            controller.progress("job1", "t", 2, {})
    controller.progress("job1", "t", 3, {})  # the connection was given back, and whole
    assert [json.loads(call.body)["seq"] for call in server.calls("POST")] == [1, 3]
    interrupt.close()


def test_a_question_that_is_refused_is_asked_again_without_what_a_child_said(
    server: FileServer, settings: Settings, controller: Controller
) -> None:
    go_on = status(200, json.dumps({"directive": "continue"}).encode())
    server.on(JOB_STATUS, status(422), status(422), go_on)
    interrupt = Interrupt()
    state: dict[str, Any] = {"message": "something that this server does not take"}
    reporter = _reporter(controller, settings, interrupt, state)
    reporter.confirm("upload")  # its thread is not started: every report is this question
    interrupt.close()
    told = [json.loads(call.body)["progress"] for call in server.calls("POST")]
    assert told[0]["message"] == "something that this server does not take"
    assert [report["phase"] for report in told] == ["upload"] * 3
    assert "message" not in told[-1]
