from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from rvmcv_worker.batch_summary import BatchSummary, LatencyBuckets
from rvmcv_worker.protocol import MAX_RESULT_BYTES, encode
from rvmcv_worker.reference import batch_summary


def _result(*classes: str, detect_s: float = 0.03, backend: str = "openvino") -> dict[str, Any]:
    timings = {"queue": 5.0, "load": 9.0, "decode": 0.01, "detect": detect_s}
    detections = [{"class": name, "confidence": 0.9, "bbox": [0, 0, 1, 1]} for name in classes]
    return {"detections": detections, "backend": backend, "precision": "fp32", "timings": timings}


def test_percentiles_are_right_within_a_hundredth_over_six_orders_of_magnitude() -> None:
    dice = random.Random(3)
    durations_ms = sorted(dice.lognormvariate(3, 2) for _ in range(20_000))
    buckets = LatencyBuckets()
    for duration_ms in durations_ms:
        buckets.add(duration_ms)
    for fraction in (0.01, 0.5, 0.95, 0.99, 1.0):
        exact = durations_ms[max(0, int(fraction * len(durations_ms)) - 1)]
        assert buckets.percentile(fraction) == pytest.approx(exact, rel=0.015)
    assert len(buckets.buckets) < 1200
    assert LatencyBuckets().percentile(0.5) is None


def test_the_largest_result_stays_in_its_report_with_all_its_parts() -> None:
    summary = BatchSummary(classes=Counter({f"a class with a long name {n:04d}": 10**6 for n in range(500)}))
    for step in range(700):
        summary.latency.add(0.01 * 1.02**step)
    path = f"s3://{'b' * 63}/cv/{'j' * 128}/attempt-10/part-00999.jsonl.gz"
    parts = [{"path": path, "sha256": "0" * 64, "images": 10_000}] * 1000
    assert len(encode({**summary.told(), "parts": parts})) < MAX_RESULT_BYTES


def test_a_summary_counts_and_survives_its_checkpoint() -> None:
    summary = BatchSummary()
    summary.add(_result("PET_bottle", "PET_bottle", "HDPE_bottle"))
    summary.add(_result(backend="torch-cpu"))
    summary.add(_result("PET_bottle", detect_s=0.2))
    summary.add_error("image_invalid")
    summary.spent_s = 2.0
    again = BatchSummary.model_validate_json(summary.model_dump_json())
    told = again.told()
    assert told == summary.told()
    assert told.pop("latency_ms") == {
        "p50": pytest.approx(40, rel=0.01),
        "p95": pytest.approx(210, rel=0.01),
        "p99": pytest.approx(210, rel=0.01),
    }
    histogram = told.pop("latency_histogram")
    assert sum(histogram["buckets"].values()) == 3
    assert told == {
        "images_ok": 3,
        "images_failed": 1,
        "errors": {"image_invalid": 1},
        "classes": {"PET_bottle": 3, "HDPE_bottle": 1},
        "images_per_s": 2.0,
        "backend": "openvino",
        "precision": "fp32",
        "backends": {"openvino fp32": 2, "torch-cpu fp32": 1},
    }


def test_a_server_adds_shards_up_to_what_one_worker_would_have_told() -> None:
    dice = random.Random(5)
    whole, shards = BatchSummary(), [BatchSummary() for _ in range(3)]
    for number in range(3000):
        # The last shard's machine is slow.
        result = _result("PET_bottle", detect_s=dice.lognormvariate(-4 + 2 * (number >= 2700), 1))
        whole.add(result)
        shards[number // 1350].add(result)
    told = [
        batch_summary.Shard(
            number,
            f"job{number}",
            "completed",
            None,
            0,
            None,
            None,
            json.loads(json.dumps({**shard.told(), "parts": []})),
            None,
        )
        for number, shard in enumerate(shards)
    ]
    merged = batch_summary.merge(told)
    assert merged["latency_is"] == "histogram"
    assert merged["latency_ms"] == whole.told()["latency_ms"]
    assert merged["images_ok"] == 3000


def test_a_batch_without_any_result_has_a_summary_too() -> None:
    told = BatchSummary().told()
    assert told["latency_ms"] == {"p50": None, "p95": None, "p99": None}
    assert (told["images_per_s"], told["backend"]) == (None, None)


def test_an_engine_that_invents_classes_does_not_fill_the_report() -> None:
    summary = BatchSummary()
    for number in range(3000):
        summary.add(_result(f"class-{number}-" * 30))
    assert len(summary.classes) == 1001
    assert summary.classes["(other)"] == 2000
    assert max(map(len, summary.classes)) == 100
