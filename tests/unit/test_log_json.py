"""`--log-format json`: one object a line, whatever is in it."""

from __future__ import annotations

import json
import re

import pytest
from loguru import logger

from rvmcv_worker import log_output, logs
from rvmcv_worker.events import Event, event


def _said(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    logger.remove()
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_an_event_is_an_object_with_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    log_output.configure("INFO", "json")
    event(Event.JOB_CLAIMED, "train_1", job_type="yolo11", attempt=2).info("yolo11, attempt {}", 2)
    event(Event.WORKER_STOPPED).info("stopped")
    claimed, stopped = _said(capsys)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(claimed.pop("time")))
    assert claimed == {
        "level": "INFO",
        "event": "job.claimed",
        "job_id": "train_1",
        "message": "yolo11, attempt 2",
        "job_type": "yolo11",
        "attempt": 2,
    }
    assert set(stopped) == {"time", "level", "event", "message"}


def test_a_number_that_json_does_not_have_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    log_output.configure("INFO", "json")
    event(Event.JOB_PROGRESS, fraction=float("nan"), eta_s=float("inf"), epoch=3).info("x")
    logger.remove()
    said = json.loads(capsys.readouterr().err, parse_constant=pytest.fail)
    assert (said["fraction"], said["eta_s"], said["epoch"]) == ("nan", "inf", 3)


def test_an_exception_is_one_field(capsys: pytest.CaptureFixture[str]) -> None:
    logs.mask("canary-of-json")
    log_output.configure("INFO", "json")
    try:
        raise ValueError("inner\n\x1b[31m canary-of-json")
    except ValueError:
        event(Event.WORKER_FAULT).exception("broke")
    (fault,) = _said(capsys)
    lines = str(fault["exception"]).split("\n")
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == ["ValueError: inner", "\\x1b[31m ********"]
