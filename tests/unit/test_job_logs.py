"""The last lines of jobs: which are kept, how many, and how they are read on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from loguru import logger

from rvmcv_worker import job_logs
from rvmcv_worker.events import Event, event
from rvmcv_worker.job_logs import JobLogs
from rvmcv_worker.state import Lane


@pytest.fixture
def logs() -> Iterator[JobLogs]:
    logs = JobLogs()
    sink = logs.listen()
    yield logs
    logger.remove(sink)


def _texts(logs: JobLogs, job_id: str, offset: int = 0) -> list[str]:
    page = logs.read(job_id, offset)
    assert page is not None
    return [line.text for line in page.lines]


def test_lines_of_both_kinds_come_in_their_order_and_of_their_job_alone(logs: JobLogs) -> None:
    logs.open("a", Lane.TRAIN)
    event(Event.JOB_CLAIMED, "a").info("stub, attempt {}", 1)
    logs.print("a", "epoch 1")
    event(Event.JOB_FAILED, "b").warning("of another job")
    logger.info("of no job")
    logger.bind(job_id="a").debug("for who looks closer")
    page = logs.read("a", 0)
    assert page is not None
    assert [(line.by, line.level, line.text) for line in page.lines] == [
        ("worker", "INFO", "job.claimed stub, attempt 1"),
        ("child", None, "epoch 1"),
    ]
    assert logs.read("b", 0) is None


def test_what_is_read_is_bounded_and_goes_on_where_it_was(logs: JobLogs) -> None:
    logs.open("a", Lane.TRAIN)
    for number in range(job_logs._PAGE_LINES + 7):
        logs.print("a", str(number))
    first = logs.read("a", 0)
    assert first is not None
    assert len(first.lines) == first.next_offset == job_logs._PAGE_LINES
    assert first.lost == 0
    assert _texts(logs, "a", first.next_offset)[0] == str(job_logs._PAGE_LINES)
    end = logs.read("a", first.next_offset + 7)
    assert end is not None
    assert (end.lines, end.next_offset) == ([], first.next_offset + 7)
    logs.print("a", "x" * 100_000)
    (cut,) = _texts(logs, "a", end.next_offset)
    assert len(cut) < 2100
    assert cut.endswith("(cut)")


@pytest.mark.parametrize(("line", "at_most"), [("short", job_logs._MAX_LINES), ("x" * 1000, 200)])
def test_memory_is_bounded_and_what_went_is_counted(logs: JobLogs, line: str, at_most: int) -> None:
    logs.open("a", Lane.TRAIN)
    for _ in range(at_most + 5):
        logs.print("a", line)
    page = logs.read("a", 0)
    assert page is not None
    assert page.lost == 5
    assert page.next_offset == 5 + len(page.lines)
    after = logs.read("a", 3)
    assert after is not None
    assert after.lost == 2


def test_running_jobs_and_the_last_that_ended_keep_their_lines(logs: JobLogs) -> None:
    logs.open("runs on", Lane.TRAIN)
    logs.print("runs on", "here")
    for number in range(job_logs._ENDED_KEPT + 1):
        logs.open(str(number), Lane.TRAIN)
        logs.close(str(number))
    logger.bind(job_id="1").info("final report accepted")
    assert logs.read("0", 0) is None
    assert _texts(logs, "1") == ["final report accepted"]
    assert _texts(logs, "runs on") == ["here"]


def test_inferences_push_no_training_out(logs: JobLogs) -> None:
    logs.open("training", Lane.TRAIN)
    logs.print("training", "here")
    logs.close("training")
    for number in range(3 * job_logs._ENDED_KEPT):
        logs.open(f"inference {number}", Lane.INFER)
        logs.close(f"inference {number}")
    assert _texts(logs, "training") == ["here"]
    kept = [number for number in range(3 * job_logs._ENDED_KEPT) if logs.read(f"inference {number}", 0)]
    assert kept == list(range(2 * job_logs._ENDED_KEPT, 3 * job_logs._ENDED_KEPT))


def test_a_job_that_comes_back_goes_on_where_it_was(logs: JobLogs) -> None:
    logs.open("a", Lane.TRAIN)
    logs.print("a", "attempt 1")
    logs.close("a")
    logs.open("a", Lane.TRAIN)
    logs.print("a", "attempt 2")
    assert _texts(logs, "a") == ["attempt 1", "attempt 2"]


def test_a_fault_is_told_with_where_it_was_and_without_values(logs: JobLogs) -> None:
    logs.open("a", Lane.TRAIN)
    try:
        raise ValueError("no such thing")
    except ValueError as error:
        event(Event.WORKER_FAULT, "a").opt(exception=error).error("a fault of the worker's own")
    said = _texts(logs, "a")
    assert said[0] == "worker.fault a fault of the worker's own"
    assert said[-1].strip() == "ValueError: no such thing"
    assert any("test_job_logs.py" in line for line in said)
