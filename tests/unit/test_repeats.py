from __future__ import annotations

import pytest
from loguru import logger

from rvmcv_worker import log_output
from rvmcv_worker.events import Event, event


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [1000.0]
    monkeypatch.setattr(log_output.time, "monotonic", lambda: now_s[0])
    return now_s


def test_what_goes_wrong_again_and_again_is_counted(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    log_output.configure("INFO")
    for number in range(200):
        event(Event.JOB_FAILED, f"infer_{number}", error_code="image_invalid").warning(f"image {number}")
    event(Event.JOB_FAILED, "train_1", error_code="dataset_invalid").warning("another kind")
    for _ in range(20):
        event(Event.JOB_CLAIMED, "train_2").info("not counted")
    clock[0] += 60
    event(Event.WORKER_STOPPED).info("stopped")
    logger.remove()
    lines = [line[20:] for line in capsys.readouterr().err.splitlines()]
    assert [line for line in lines if "] image" in line] == [
        f"WARNING job.failed [infer_{number}] image {number}" for number in range(10)
    ]
    assert "WARNING job.failed [train_1] another kind" in lines
    assert len([line for line in lines if "not counted" in line]) == 20
    assert lines[-2:] == [
        "WARNING job.failed 190 more like this in a minute, the last of them: image 199",
        "INFO    worker.stopped stopped",
    ]


def test_of_each_training_it_is_told_how_it_ended(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    log_output.configure("INFO")
    for number in range(30):
        with logger.contextualize(lane="train"):
            event(Event.JOB_FAILED, f"train_{number}", error_code="dataset_invalid").warning("no images")
    logger.remove()
    assert len(capsys.readouterr().err.splitlines()) == 30


def test_what_was_held_back_is_told_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    output = log_output.LogOutput("text")
    logger.remove()
    logger.add(output.write, format="{message}")
    for _ in range(11):
        event(Event.REPORT_WAITS).warning("final reports wait")
    output.close()
    logger.remove()
    *_, last = capsys.readouterr().err.splitlines()
    assert last.endswith("report.waits 1 more like this in a minute, the last of them: final reports wait")


def test_it_is_told_though_nothing_else_happens(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    output = log_output.configure("ERROR")
    for _ in range(11):
        event(Event.TOKEN_REJECTED).error("it is not taken")
    output.tell_held_back()
    assert len(capsys.readouterr().err.splitlines()) == 10
    clock[0] += 60
    for _ in range(2):
        output.tell_held_back()
    logger.remove()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("token.rejected 1 more like this in a minute, the last of them: it is not taken")
