from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.jobs import batch_config

IMAGES = [{"id": 1, "url": "s3://images/a.jpg"}]


def test_a_batch_takes_the_options_of_an_inference() -> None:
    parsed = batch_config.parse(
        {"images": IMAGES, "confidence_threshold": 0.5, "mask_format": "rle", "purpose": "batch_analysis"}
    )
    assert (parsed.images, parsed.part_size) == (IMAGES, 1000)
    assert parsed.options().confidence == 0.5


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "one of images and manifest_url must be given"),
        ({"images": IMAGES, "manifest_url": "s3://a/b"}, "and only one"),
        ({"images": []}, "config.images: List should have at least 1 item"),
        ({"images": "s3://a/b"}, "config.images: "),
        ({"images": IMAGES, "manifest_sha256": "0" * 64}, "manifest_sha256 goes with manifest_url only"),
        ({"images": IMAGES, "part_size": 0}, "config.part_size: should be greater than or equal to 1"),
        ({"images": IMAGES, "part_size": 10_001}, "config.part_size: should be less than or equal to 10000"),
        ({"images": IMAGES, "confidence_threshold": 1.5}, "config.confidence_threshold: "),
        ({"images": IMAGES, "image_url": "s3://a/b"}, "config.image_url: no such option"),
        ({"images": IMAGES, "edge_result": {}}, "config.edge_result: no such option"),
        ({"manifest": "s3://a/b"}, "did you mean 'manifest_url'?"),
    ],
)
def test_a_wrong_config_is_named(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        batch_config.parse(config)
    assert says in caught.value.message


def test_what_is_asked_of_the_images_tells_one_batch_from_another() -> None:
    one = batch_config.parse({"images": IMAGES}).asked()
    assert batch_config.parse({"images": IMAGES, "part_size": 7, "purpose": "reanalysis"}).asked() == one
    for changed in ({"iou_threshold": 0.5}, {"img_size": 320}, {"annotated": True}, {"mask_format": "rle"}):
        assert batch_config.parse({"images": IMAGES, **changed}).asked() != one


def test_the_job_of_the_protocol_s_page_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```json\n(.*?)^```$", page.partition("### Batches")[2], re.MULTILINE | re.DOTALL)
    (job,) = json.loads(blocks[0])["jobs"]
    parsed = batch_config.parse(job["config"])
    assert (parsed.part_size, parsed.model_active) == (1000, True)
