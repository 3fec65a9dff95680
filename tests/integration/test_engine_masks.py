"""An engine with SAM2 behind its detector: masks, drawn pictures, and what is kept for a second question."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rvmcv_worker.compute import image_decode, rle
from rvmcv_worker.compute.segmenter import open_segmenter
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


def test_a_fine_tuned_segmenter_sees_images_at_the_edge_that_it_was_trained_at(
    engine: EngineChild, shared: Path
) -> None:
    yolo = shared / "models" / "pet_hdpe_yolo11n.pt"
    image = next(iter(sorted((shared / "datasets" / "pet_hdpe_det").rglob("*.jpg")))).read_bytes()
    tuned = sam2_files.save(engine.root / "in" / "tuned.pt", **sam2_files.METADATA)

    def masks(number: int, sam2: str) -> NDArray[np.bool_]:
        answered = engine.infer(_request(engine.root, number, yolo, MaskFormat.RLE, sam2=sam2), image)
        assert answered.result is not None
        written = [found["segmentation"] for found in answered.result["detections"]]
        return np.stack(
            [rle.from_string(each["counts"], *each["size"]).mask(*each["size"]) for each in written]
        )

    # Both know the image under the same sha256, and neither takes the other's embedding for its own.
    at_1024, at_128, again_at_1024, again_at_128 = (
        masks(number, sam2) for number, sam2 in enumerate(["sam2.pt", "tuned.pt", "sam2.pt", "tuned.pt"], 10)
    )

    np.testing.assert_array_equal(at_1024, again_at_1024)
    np.testing.assert_array_equal(at_128, again_at_128)
    pixels = image_decode.decode(image, 100_000_000)
    result = engine.infer(_request(engine.root, 20, yolo, MaskFormat.RLE), image).result
    assert result is not None
    boxes = np.array([found["bbox"] for found in result["detections"]], np.float32)
    own = np.stack(list(open_segmenter(tuned, device="cpu", cache=None).segment(pixels, boxes, image_key="")))
    assert (at_128 == own).mean() > 0.99  # the boxes were rounded
    assert (at_128 == at_1024).mean() < 0.95


def test_a_segmenter_that_asks_for_too_much_is_refused(engine: EngineChild, shared: Path) -> None:
    yolo = shared / "models" / "pet_hdpe_yolo11n.pt"
    image = next(iter(sorted((shared / "datasets" / "pet_hdpe_det").rglob("*.jpg")))).read_bytes()
    sam2_files.save(engine.root / "in" / "huge.pt", {"model": sam2_files.hollow(), "image_px": 65536})
    answered = engine.infer(_request(engine.root, 30, yolo, MaskFormat.RLE, sam2="huge.pt"), image)
    assert answered.error["code"] == "model_invalid"
    assert "huge.pt says that its image_px is 65536; save it with" in answered.error["message"]


def test_what_is_no_segmenter_fails_alone(engine: EngineChild, shared: Path) -> None:
    yolo = shared / "models" / "pet_hdpe_yolo11n.pt"
    image = next(iter(sorted((shared / "datasets" / "pet_hdpe_det").rglob("*.jpg")))).read_bytes()
    _request(engine.root, 3, yolo, MaskFormat.RLE)  # puts yolo.pt there
    answered = engine.infer(_request(engine.root, 3, yolo, MaskFormat.RLE, sam2="yolo.pt"), image)
    assert answered.error["code"] == "model_invalid"
    assert "yolo.pt is an Ultralytics checkpoint" in answered.error["message"]
