from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from loguru import logger

from rvmcv_worker import progress_log
from rvmcv_worker.progress_log import ProgressLog


class Clock:
    now_s = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(progress_log.time, "monotonic", lambda: Clock.now_s)
    monkeypatch.setattr(Clock, "now_s", 100.0)
    return Clock()


@pytest.fixture
def seen() -> Iterator[list[Any]]:
    lines: list[Any] = []
    sink = logger.add(lambda message: lines.append(message.record), format="{message}")
    yield lines
    logger.remove(sink)


def test_a_training_tells_its_phases_its_first_epoch_and_then_a_line_a_minute(
    clock: Clock, seen: list[Any]
) -> None:
    log = ProgressLog("train_1")
    log.tell({"phase": "verify", "fraction": 0.0})
    log.tell({"phase": "verify", "fraction": 1.0, "images_done": 9, "images_total": 9})
    log.tell({"phase": "train", "fraction": 1.0, "epoch": 0})
    for epoch in range(1, 300):
        Clock.now_s += 1.0
        log.tell(
            {
                "phase": "train",
                "fraction": epoch / 300,
                "epoch": epoch,
                "epochs": 300,
                "eta_s": 300.0 - epoch,
                "metrics": {"mAP50-95": epoch / 1000},
            }
        )
    log.tell({"phase": "evaluate", "epoch": 300})
    assert [record["message"] for record in seen] == [
        "verify",
        "train",
        "train, epoch 1 of 300, mAP50-95 0.001, 5 min to go",
        *(
            f"train, epoch {epoch} of 300, mAP50-95 {epoch / 1000:.3f}, {left} to go"
            for epoch, left in ((61, "4 min"), (121, "3 min"), (181, "2 min"), (241, "59 s"))
        ),
        "evaluate",
    ]
    assert seen[3]["extra"]["job_id"] == "train_1"
    assert seen[3]["extra"]["details"] == {
        "phase": "train",
        "fraction": 61 / 300,
        "epoch": 61,
        "epochs": 300,
        "images_done": None,
        "images_total": None,
        "eta_s": 239.0,
        "metric": "mAP50-95",
        "metric_value": 0.061,
    }


def test_a_batch_tells_its_images(clock: Clock, seen: list[Any]) -> None:
    log = ProgressLog("batch_1")
    for done in range(130):
        log.tell({"phase": "infer", "images_done": done, "images_total": 130, "fraction": done / 130})
        Clock.now_s += 1.0
    assert [record["message"] for record in seen] == [
        "infer",
        "infer, 60 of 130 images",
        "infer, 120 of 130 images",
    ]


def test_a_child_that_says_anything_fills_no_log(clock: Clock, seen: list[Any]) -> None:
    log = ProgressLog("train_1")
    for number in range(500):
        log.tell({"phase": ("train", "verify", "nonsense", 7, ["x"])[number % 5], "epoch": [number]})
    Clock.now_s += 60
    log.tell({"phase": "train", "epoch": 1, "metrics": {"mAP50-95": 10**400}, "eta_s": float("nan")})
    assert [record["message"] for record in seen] == ["train", "verify", "train, epoch 1 of ?"]
