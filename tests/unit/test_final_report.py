from __future__ import annotations

from typing import Any

from rvmcv_worker import final_report
from rvmcv_worker.batch_summary import BatchSummary
from rvmcv_worker.protocol import MAX_RESULT_BYTES, encode


def test_a_batch_of_very_many_parts_is_told_without_them() -> None:
    summary = BatchSummary(images_ok=1_000_000)
    summary.add_error("image_invalid")
    told = {"images_total": 1_000_001, **summary.told(), "parts": [{"path": "x"}], "model_used": "v3"}
    brief = final_report.brief(told)
    assert (brief["images_total"], brief["images_ok"], brief["model_used"]) == (1_000_001, 1_000_000, "v3")
    assert brief["errors"] == {"image_invalid": 1}
    # Half a histogram would be added to others as if it were whole.
    assert not {"parts", "latency_histogram"} & set(brief)


def test_a_training_keeps_the_single_values_of_its_metrics() -> None:
    metrics = {"mAP50": 0.9, "active": {"mAP50": 0.8}, "classes": ["a"]}
    artifacts = {str(number): "s3://models/x" for number in range(101)}
    brief = final_report.brief({"version": "v1", "metrics": metrics, "artifacts": artifacts})
    assert brief == {"version": "v1", "metrics": {"mAP50": 0.9}}


def test_what_a_child_blew_up_leaves_a_report_of_its_size() -> None:
    many: dict[str, Any] = {f"{number}": "x" * 4000 for number in range(1000)}
    brief = final_report.brief(
        {"version": "v1", "metrics": {"verdict": "x" * 10**6, "y" * 10**6: 1, "mAP50": 0.9, **many}}
    )
    assert (brief["version"], brief["metrics"]["mAP50"]) == ("v1", 0.9)
    assert "verdict" not in brief["metrics"]
    assert len(encode(brief)) <= MAX_RESULT_BYTES
