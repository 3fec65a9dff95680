"""What a journal gets of an event, and where the event goes when the journal does not take it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from loguru import logger

from rvmcv_worker import cli, journal, log_output
from rvmcv_worker.events import Event, event
from tests.journal_socket import JournalSocket, under_systemd

Start = Callable[[], io.TextIOWrapper]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Start]:
    """Set the output up as under systemd; in the test itself, for pytest brings its own standard error."""

    with contextlib.ExitStack() as ends:

        def begin() -> io.TextIOWrapper:
            stream = ends.enter_context(under_systemd(monkeypatch, tmp_path, tmp_path / "socket"))
            ends.callback(logger.remove)
            log_output.configure("INFO")
            return stream

        yield begin


def _written(stderr: io.TextIOWrapper) -> list[str]:
    stderr.flush()
    return Path(stderr.name).read_text().splitlines()


def test_an_event_has_fields_by_which_to_look_for_it(start: Start, tmp_path: Path) -> None:
    stderr = start()
    with JournalSocket(tmp_path / "socket") as taken:
        event(Event.JOB_FAILED, "train_1", error_code="dataset_invalid", epoch=None).warning(
            "failed: {}", "x"
        )
        entries = taken.entries()
    assert entries == [
        {
            "MESSAGE": "job.failed [train_1] failed: x",
            "PRIORITY": "4",
            "SYSLOG_IDENTIFIER": "rvmcv-worker",
            "RVMCV_EVENT": "job.failed",
            "RVMCV_JOB_ID": "train_1",
            "RVMCV_ERROR_CODE": "dataset_invalid",
        }
    ]
    assert _written(stderr) == []


def test_a_fault_is_one_entry_with_its_traceback(start: Start, tmp_path: Path) -> None:
    start()
    with JournalSocket(tmp_path / "socket") as taken:
        try:
            raise ValueError("inner\n<0>forged")
        except ValueError:
            event(Event.WORKER_FAULT).exception("broke")
        (entry,) = taken.entries()
    first, *trace, last = entry["MESSAGE"].split("\n")
    assert first == "worker.fault broke"
    assert trace[0] == "  Traceback (most recent call last):"
    assert last == "  <0>forged"
    assert entry["PRIORITY"] == "3"


def test_an_event_too_large_for_a_datagram_comes_whole(start: Start, tmp_path: Path) -> None:
    stderr = start()
    text = "x" * 3_000_000
    with JournalSocket(tmp_path / "socket") as taken:
        event(Event.JOB_FAILED, "train_1").warning(text)
        (entry,) = taken.entries()
    assert entry["MESSAGE"] == f"job.failed [train_1] {text}"
    assert _written(stderr) == []


def test_without_the_socket_standard_error_has_the_priority_on_each_line(start: Start) -> None:
    stderr = start()
    event(Event.JOB_FENCED, "job1").warning("lost\n<0>forged {}", "x")
    try:
        raise ValueError("inner\n<0>forged")
    except ValueError:
        event(Event.WORKER_FAULT).exception("broke")
    lines = _written(stderr)
    assert lines[0] == "<4>job.fenced [job1] lost\\n<0>forged x"
    assert lines[1] == "<3>worker.fault broke"
    assert all(line.startswith("<3>  ") for line in lines[2:])


def test_of_a_journal_that_is_full_nothing_is_lost(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = start()
    monkeypatch.setattr(journal, "_PATIENCE_S", 0.02)
    monkeypatch.setattr(journal, "_REST_S", 0.0)
    count = 400
    with JournalSocket(tmp_path / "socket") as taken:
        for number in range(count):
            event(Event.JOB_PROGRESS, "train_1").info(f"{number}.")
            if len(_written(stderr)) == 2:
                break
        sent = number + 1
        told = [entry["MESSAGE"] for entry in taken.entries()]
        event(Event.JOB_PROGRESS, "train_1").info("and on")
        assert [entry["MESSAGE"] for entry in taken.entries()] == ["job.progress [train_1] and on"]
    left = [line.removeprefix("<6>") for line in _written(stderr)]
    assert len(left) == 2, "there was a journal that was full"
    assert [*told, *left] == [f"job.progress [train_1] {each}." for each in range(sent)]


def test_a_journal_whose_socket_is_made_anew_gets_the_next_event(start: Start, tmp_path: Path) -> None:
    stderr = start()
    for round_number in range(2):
        with JournalSocket(tmp_path / "socket") as taken:
            event(Event.WORKER_STARTED).info(f"round {round_number}")
            assert [entry["MESSAGE"] for entry in taken.entries()] == [f"worker.started round {round_number}"]
    assert _written(stderr) == []


def test_a_journal_that_was_away_is_asked_again_after_a_rest(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = start()
    event(Event.WORKER_STARTED).info("one")
    with JournalSocket(tmp_path / "socket") as taken:
        event(Event.WORKER_STARTED).info("two")
        assert taken.entries() == []
        now_s = journal.time.monotonic()
        monkeypatch.setattr(journal.time, "monotonic", lambda: now_s + journal._REST_S)
        event(Event.WORKER_STARTED).info("three")
        assert [entry["MESSAGE"] for entry in taken.entries()] == ["worker.started three"]
    assert _written(stderr) == ["<6>worker.started one", "<6>worker.started two"]


def test_the_variable_of_another_process_says_nothing_of_ours() -> None:
    program = "from rvmcv_worker import journal; print(journal.has_stderr())"
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "JOURNAL_STREAM": stream},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for stream in ("8:1", "", "x")
    ]
    assert said == ["False"] * 3


def test_why_the_daemon_cannot_begin_is_an_event(start: Start, tmp_path: Path) -> None:
    start()
    wrong = tmp_path / "config.toml"
    wrong.write_text("[worker]\nidd = 'x'\n[server]\nurll = 1\n")
    with JournalSocket(tmp_path / "socket") as taken:
        with pytest.raises(typer.Exit):
            cli.run(wrong)
        entries = taken.entries()
    assert {entry["PRIORITY"] for entry in entries} == {"2"}
    assert {entry["RVMCV_EVENT"] for entry in entries} == {"worker.not_started"}
    told = "".join(entry["MESSAGE"] for entry in entries)
    assert "did you mean" in told
