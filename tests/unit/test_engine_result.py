"""What an engine answers for one image."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from rvmcv_worker.compute.engine_result import ResultWriter
from rvmcv_worker.compute.found import Found
from rvmcv_worker.engine_wire import MAX_RESULT_BYTES, MaskFormat
from rvmcv_worker.errors import ModelInvalidError, UnsupportedJobError

NAMES = ["PET", "HDPE"]


def found(count: int) -> Found:
    rng = np.random.default_rng(count)
    return Found(
        boxes=np.sort(rng.uniform(0, 100, (count, 2, 2)), axis=1).reshape(-1, 4).astype(np.float32),
        scores=rng.uniform(0, 1, count).astype(np.float32),
        classes=np.arange(count, dtype=np.int64) % 2,
    )


def test_no_number_is_rounded() -> None:
    seen = found(3)
    result = json.loads(ResultWriter(seen, NAMES, MaskFormat.PNG).to_json({"batch": 1}))
    assert result["batch"] == 1
    detections = result["detections"]
    assert [detection["class"] for detection in detections] == ["PET", "HDPE", "PET"]
    boxes = np.array([detection["bbox"] for detection in detections])
    scores = np.array([detection["confidence"] for detection in detections])
    assert np.array_equal(boxes, seen.boxes.astype(float))
    assert np.array_equal(scores, seen.scores.astype(float))


def test_masks_are_written_as_they_pass_by_one_at_a_time() -> None:
    made = 0

    def masks() -> Iterator[NDArray[np.bool_]]:
        nonlocal made
        for size in range(1, 4):
            made += 1
            mask = np.zeros((20, 30), np.bool_)
            mask[:size, :size] = True
            yield mask

    writer = ResultWriter(found(3), NAMES, MaskFormat.RLE)
    passing = writer.with_masks(masks())
    assert [int(next(passing).sum()), made] == [1, 1]
    assert [int(mask.sum()) for mask in passing] == [4, 9]
    detections = json.loads(writer.to_json({}))["detections"]
    assert [detection["segmentation"]["size"] for detection in detections] == [[20, 30]] * 3


def test_a_result_that_grows_too_large_is_told_before_it_is_whole() -> None:
    noise = np.random.default_rng(0).integers(0, 2, (3000, 3000)).astype(bool)
    count = 300
    writer = ResultWriter(found(count), NAMES, MaskFormat.PNG)
    passing = writer.with_masks(noise for _ in range(count))
    first = list(itertools.islice(passing, 10))
    assert len(first) == 10
    with pytest.raises(UnsupportedJobError, match="the result of 300 detections takes more than 16 MiB"):
        list(itertools.islice(passing, 20))


def test_a_result_of_many_detections_alone_fits() -> None:
    assert len(ResultWriter(found(1000), NAMES, MaskFormat.PNG).to_json({})) < MAX_RESULT_BYTES


@pytest.mark.parametrize("field", ["boxes", "scores"])
def test_numbers_that_are_not_finite_are_the_fault_of_the_model(field: str) -> None:
    seen = found(2)
    getattr(seen, field)[0] = np.nan
    with pytest.raises(ModelInvalidError, match="not finite"):
        ResultWriter(seen, NAMES, MaskFormat.PNG)


def test_a_box_inside_out_and_an_impossible_confidence_are_the_fault_of_the_model() -> None:
    for change in (lambda seen: seen.boxes[0].__setitem__(0, 1000.0), lambda seen: seen.scores.fill(1.5)):
        seen = found(2)
        change(seen)
        with pytest.raises(ModelInvalidError, match="no YOLO11 can"):
            ResultWriter(seen, NAMES, MaskFormat.PNG)
