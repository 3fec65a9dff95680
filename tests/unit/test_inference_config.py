from __future__ import annotations

from typing import Any

import pytest

from rvmcv_worker.engine_wire import MaskFormat
from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.jobs.inference import Inference, InferenceConfig

URL = "https://minio.server/images/bottle_123.jpg"
EDGE = {"detections": [{"class": "PET", "confidence": 0.9, "bbox": [1, 2, 3, 4]}], "image_size": [640, 480]}


def _parse(**config: Any) -> InferenceConfig:
    return Inference().parse({"image_url": URL, **config})


def test_a_url_is_enough() -> None:
    config = _parse()
    assert (config.model_version, config.model_active, config.segmentation) == (None, False, False)
    options = config.options()
    assert (options.confidence, options.iou, options.imgsz, options.max_detections) == (0.25, 0.7, None, 300)


def test_everything_that_the_protocol_names_is_taken() -> None:
    config = _parse(
        image_sha256="0" * 64,
        model_version="yolo11_v3_best.pt",
        model_sha256="1" * 64,
        model_active=True,
        confidence_threshold=0.75,
        iou_threshold=0,
        img_size=320,
        max_detections=10,
        segmentation=True,
        segmenter="sam2.1_hiera_small",
        segmenter_sha256="2" * 64,
        segmenter_active=True,
        mask_format="png_crop",
        annotated=True,
        purpose="fraud_check",
        edge_result=EDGE,
        callback_url="https://elsewhere",
    )
    assert config.options().mask_format is MaskFormat.PNG_CROP
    assert config.edge_result
    assert config.edge_result.detections[0].bbox == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"confidence_threshold": 1.5}, "config.confidence_threshold: should be less than or equal to 1"),
        ({"confidence_threshold": True}, "config.confidence_threshold"),
        ({"iou_threshold": -0.1}, "config.iou_threshold"),
        ({"img_size": 100}, "config.img_size: should be a multiple of 32"),
        ({"img_size": 4096}, "config.img_size"),
        ({"max_detections": 0}, "config.max_detections"),
        ({"model_version": "../x"}, "config.model_version"),
        ({"model_sha256": "A" * 64}, "config.model_sha256"),
        ({"model_active": "true"}, "config.model_active"),
        ({"mask_format": "jpeg"}, "config.mask_format"),
        ({"purpose": "fun"}, "config.purpose"),
        ({"confidence": 0.5}, "config.confidence: no such option; did you mean 'confidence_threshold'?"),
        ({"edge_result": {}}, "config.edge_result.detections: Field required"),
        (
            {"edge_result": {"detections": [{"class": "PET", "confidence": 0.9, "bbox": [3, 2, 1, 4]}]}},
            "config.edge_result.detections.0.bbox: must be x1, y1, x2, y2",
        ),
        (
            {"edge_result": {"detections": [{"class": "PET", "confidence": 90}]}},
            "config.edge_result.detections.0.confidence",
        ),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidJobError) as error:
        _parse(**wrong)
    assert said in error.value.message


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(InvalidJobError) as error:
        _parse(img_size=7, mask_format="x", colour="red")
    assert all(f"config.{key}" in error.value.message for key in ("img_size", "mask_format", "colour"))


def test_a_job_without_an_image_is_refused() -> None:
    with pytest.raises(InvalidJobError, match=r"config\.image_url: Field required"):
        Inference().parse({})
