"""An engine with SAM2 behind its detector: masks, drawn pictures, and what is kept for a second question."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from rvmcv_worker.engine_wire import Backend, MaskFormat, Model, Options, Queue, Request, Segmenter
from tests import sam2_files
from tests.engine_child import EngineChild

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineChild]:
    root = tmp_path_factory.mktemp("engine")
    (root / "in").mkdir()
    sam2_files.save(root / "in" / "sam2.pt")
    running = EngineChild(root)
    running.ready()
    yield running
    running.close()


def _request(
    root: Path, number: int, yolo: Path, mask_format: MaskFormat, *, sam2: str = "sam2.pt"
) -> Request:
    target = root / "in" / "yolo.pt"
    if not target.exists():
        target.write_bytes(yolo.read_bytes())
    return Request(
        number,
        Queue.INTERACTIVE,
        Model(hashlib.sha256(target.read_bytes()).hexdigest(), "in/yolo.pt", Backend("torch-cpu", "fp32")),
        Options(confidence=0.05, segmentation=True, mask_format=mask_format, annotated=True),
        Segmenter(hashlib.sha256((root / "in" / sam2).read_bytes()).hexdigest(), f"in/{sam2}"),
    )


def test_boxes_have_masks_and_a_second_question_is_not_encoded_again(
    engine: EngineChild, shared: Path
) -> None:
    yolo = shared / "models" / "pet_hdpe_yolo11n.pt"
    image = next(iter(sorted((shared / "datasets" / "pet_hdpe_det").rglob("*.jpg")))).read_bytes()
    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size

    first = engine.infer(_request(engine.root, 1, yolo, MaskFormat.RLE), image)
    second = engine.infer(_request(engine.root, 2, yolo, MaskFormat.PNG_CROP), image)

    assert first.result is not None
    assert second.result is not None
    assert first.result["detections"], "nothing found would show nothing"
    for detection in first.result["detections"]:
        assert detection["segmentation"]["size"] == [height, width]
    for detection in second.result["detections"]:
        assert set(detection["segmentation"]) == {"png", "offset", "size"}
    for answered in (first, second):
        with Image.open(io.BytesIO(answered.picture)) as picture:
            assert (picture.format, max(picture.size)) == ("JPEG", max(width, height, 640))
    assert second.result["timings"]["segment"] < first.result["timings"]["segment"] / 2


def test_what_is_no_segmenter_fails_alone(engine: EngineChild, shared: Path) -> None:
    yolo = shared / "models" / "pet_hdpe_yolo11n.pt"
    image = next(iter(sorted((shared / "datasets" / "pet_hdpe_det").rglob("*.jpg")))).read_bytes()
    _request(engine.root, 3, yolo, MaskFormat.RLE)  # puts yolo.pt there
    answered = engine.infer(_request(engine.root, 3, yolo, MaskFormat.RLE, sam2="yolo.pt"), image)
    assert answered.error["code"] == "model_invalid"
    assert "yolo.pt is an Ultralytics checkpoint" in answered.error["message"]
