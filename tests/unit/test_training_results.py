"""What of a train child's result is believed."""

from __future__ import annotations

from typing import Any

import pytest

from rvmcv_worker.errors import JobCrashedError
from rvmcv_worker.jobs import sam2
from rvmcv_worker.jobs.training_results import Prepared, Trained, require

METRICS: dict[str, Any] = {
    "miou": 0.9,
    "fitness": 0.9,
    "base": {"miou": 0.8},
    "improved": True,
    "verdict": "better than the base model on val",
    "active": None,
}
TRAINED: dict[str, Any] = {"metrics": METRICS, "effective": {}, "versions": {}, "attempts": [{"epochs": 1}]}


def _require(result: dict[str, Any]) -> None:
    require(Trained, "train", result, sam2.KIND.metrics)


def test_an_honest_result_is_taken() -> None:
    _require(TRAINED)
    _require({**TRAINED, "more": 1, "metrics": {**METRICS, "fitness": 1, "active": {"error": "gone"}}})


@pytest.mark.parametrize("key", TRAINED)
def test_what_a_result_is_made_of_must_be_there_and_of_its_kind(key: str) -> None:
    for wrong in (None, "text", 3, [1]):
        with pytest.raises(JobCrashedError, match=rf"train/result.json is no result of a training: {key}"):
            _require({**TRAINED, key: wrong})


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("fitness", "0.9"),
        ("fitness", True),
        ("fitness", None),
        ("improved", "yes"),
        ("improved", None),
        ("verdict", "x" * 100_000),
        ("verdict", ["better"]),
        ("active", "better"),
        ("active", [0.9]),
        ("base", None),
    ],
)
def test_metrics_that_people_decide_by_are_held_to_their_kind(key: str, wrong: Any) -> None:
    with pytest.raises(JobCrashedError, match=rf"metrics\.{key}") as caught:
        _require({**TRAINED, "metrics": {**METRICS, key: wrong}})
    assert len(caught.value.message) < 500


def test_a_training_without_what_a_sam2_must_tell_is_none() -> None:
    with pytest.raises(JobCrashedError, match=r"metrics\.improved is missing; metrics\.verdict is missing"):
        _require({**TRAINED, "metrics": {"miou": 0.9, "fitness": 0.9, "base": {}}})
    require(Trained, "train", {**TRAINED, "metrics": {"fitness": 0.9}})


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"names": [], "leaks": {}},
        {"names": "ab", "leaks": {}},
        {"names": ["a", 1], "leaks": {}},
        {"names": ["a"], "leaks": {"train/val": {"equal": -1, "near": 0}}},
        {"names": ["a"], "leaks": {"train/val": {"equal": "0"}}},
    ],
)
def test_a_data_report_must_name_classes_and_count_leaks(report: dict[str, Any]) -> None:
    with pytest.raises(JobCrashedError, match=r"prepare/result\.json"):
        require(Prepared, "prepare", report)
