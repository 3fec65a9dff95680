"""Counts: exact under threads, and bounded in their labels whatever is counted."""

from __future__ import annotations

import contextlib
import threading

import pytest
from prometheus_client import generate_latest

from rvmcv_worker.answers import (
    ControllerError,
    NotFoundError,
    PollAbandonedError,
    RedirectRefusedError,
    ServerUnavailableError,
    TokenRejectedError,
)
from rvmcv_worker.errors import CODES, FencedError, JobCancelledError
from rvmcv_worker.tally import Tally


def _value(tally: Tally, name: str, **labels: str) -> float | None:
    return tally.registry.get_sample_value(name, labels)


def _lines(tally: Tally) -> list[str]:
    return generate_latest(tally.registry).decode().splitlines()


def test_no_stranger_s_text_becomes_a_label() -> None:
    tally = Tally(["yolo11"])
    before = len(_lines(tally))
    for evil in ('"} 1\nfake 2', "ünknown", "x" * 10_000, ""):
        tally.ended(evil, "failed", evil, 1.0)
    assert _value(
        tally, "rvmcv_job_ends_total", job_type="unknown", status="failed", code="internal"
    ) == pytest.approx(4)
    text = "\n".join(_lines(tally))
    assert "fake" not in text
    assert "xxxx" not in text
    # One more end, and one more histogram.
    assert len(_lines(tally)) < before + 40


def test_every_end_there_can_be_is_shown_before_it_comes() -> None:
    tally = Tally(["yolo11", "inference"])
    shown = [line for line in _lines(tally) if line.startswith("rvmcv_job_ends_total{")]
    assert len(shown) == 2 * (3 + len(CODES))
    assert all(line.endswith(" 0.0") for line in shown)
    tally.ended("yolo11", "queued", "worker_unfit", 5)
    tally.ended("yolo11", "completed", None, 7200)
    assert len([line for line in _lines(tally) if line.startswith("rvmcv_job_ends_total{")]) == len(shown)
    ended = {"job_type": "yolo11", "status": "queued", "code": "worker_unfit"}
    assert _value(tally, "rvmcv_job_ends_total", **ended) == 1


def test_a_training_of_days_and_an_image_of_milliseconds_both_have_their_buckets() -> None:
    tally = Tally(["yolo11", "inference"])
    tally.ended("inference", "completed", None, 0.07)
    tally.ended("yolo11", "completed", None, 30 * 3600.0)
    of = {"status": "completed"}
    bucket = "rvmcv_job_duration_seconds_bucket"
    assert _value(tally, bucket, job_type="inference", le="0.05", **of) == 0
    assert _value(tally, bucket, job_type="inference", le="0.1", **of) == 1
    assert _value(tally, bucket, job_type="yolo11", le="86400.0", **of) == 0
    assert _value(tally, bucket, job_type="yolo11", le="172800.0", **of) == 1


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (TokenRejectedError("x"), "token_rejected"),
        (PollAbandonedError("x"), "abandoned"),
        (NotFoundError("x"), "not_found"),
        (RedirectRefusedError("x"), "unavailable"),
        (ServerUnavailableError("x"), "unavailable"),
        (ControllerError("x"), "failed"),
        (FencedError("taken"), "fenced"),
        (JobCancelledError(), "abandoned"),
    ],
)
def test_a_call_is_counted_by_what_came_of_it(error: Exception | None, outcome: str) -> None:
    tally = Tally()
    with contextlib.suppress(Exception), tally.request("claim"):
        if error:
            raise error
    name = "rvmcv_server_request_duration_seconds_count"
    assert _value(tally, name, call="claim", outcome=outcome) == 1


def test_nothing_is_lost_between_threads() -> None:
    tally = Tally(["stub"])

    def count() -> None:
        for _ in range(1000):
            tally.fetched("storage", 3)
            tally.stored("artifact", 7)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _value(tally, "rvmcv_fetched_bytes_total", source="storage") == 24_000
    assert _value(tally, "rvmcv_stored_bytes_total", kind="artifact") == 56_000
    assert _value(tally, "rvmcv_stored_files_total", kind="artifact") == 8000
