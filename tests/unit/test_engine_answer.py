"""What of an engine's answers is believed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rvmcv_worker.engine_answer import AnswerError, read_result
from rvmcv_worker.engine_wire import MaskFormat, Options


def answer(mask: Any, mask_format: MaskFormat) -> dict[str, Any]:
    found = {"class": "bottle", "confidence": 0.5, "bbox": [0, 0, 4, 2], "segmentation": mask}
    about = {"image_size": [4, 2], "backend": "torch-cpu", "precision": "fp32", "batch": 1}
    payload = json.dumps({**about, "detections": [found]}).encode()
    return read_result(payload, 0, Options(segmentation=True, mask_format=mask_format))[0]


@pytest.mark.parametrize(
    ("mask_format", "mask"),
    [
        (MaskFormat.PNG, "AA=="),
        (MaskFormat.PNG_CROP, {"png": "AA==", "offset": [1, 1], "size": [3, 1]}),
        (MaskFormat.RLE, {"size": [2, 4], "counts": "08"}),
        (MaskFormat.POLYGON, [[0, 0, 3, 0, 3, 1]]),
    ],
)
def test_masks_of_each_kind_come_through(mask_format: MaskFormat, mask: Any) -> None:
    assert answer(mask, mask_format)["detections"][0]["segmentation"] == mask


@pytest.mark.parametrize(
    ("mask_format", "mask"),
    [
        (MaskFormat.PNG, "<script>"),
        (MaskFormat.PNG_CROP, {"png": "AA==", "offset": [2, 1], "size": [3, 1]}),
        (MaskFormat.PNG_CROP, {"png": "AA==", "offset": [-1, 0], "size": [1, 1]}),
        (MaskFormat.RLE, {"size": [4, 2], "counts": "08"}),
        (MaskFormat.POLYGON, "AA=="),
    ],
)
def test_masks_of_another_kind_or_place_do_not(mask_format: MaskFormat, mask: Any) -> None:
    with pytest.raises(AnswerError):
        answer(mask, mask_format)
