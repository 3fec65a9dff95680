"""Data sets of YOLO's polygons as a SAM2 job takes them; of COCO JSON: `test_datasets_coco.py`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from rvmcv_worker.compute.faults import FaultKind
from rvmcv_worker.compute.instances import Instance
from rvmcv_worker.errors import DatasetInvalidError
from tests.dataset_fixtures import Prepared, draw, pack, pack_folder

NAMES = {"data.yaml": b"names: [bottle, can]\n"}
TRIANGLE = "1 0.1 0.1 0.5 0.1 0.3 0.6"
BOW = "0 0.1 0.1 0.9 0.9 0.9 0.2 0.1 0.4"
EIGHT = "0 0.1 0.1 0.9 0.9 0.9 0.1 0.1 0.9"


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path / "job")


def polygons(*lines: str, count: int = 5) -> dict[str, bytes]:
    """Return a set whose first train image has these lines, the others a triangle."""
    files = dict(NAMES)
    for number, split in enumerate(("train", "val")):
        for index in range(count):
            files[f"images/{split}/{index}.jpg"] = draw(100 * number + index)
            files[f"labels/{split}/{index}.txt"] = TRIANGLE.encode()
    files["labels/train/0.txt"] = "\n".join(lines).encode()
    return files


def test_polygons_become_instances(prepared: Prepared) -> None:
    pack(prepared.archive, polygons(TRIANGLE, "0 0.5 0.5 0.75 0.5 0.75 0.75 0.5 0.75", TRIANGLE))
    report = prepared.run_sam2()
    assert report["fault_counts"] == {"duplicate_line": 1}
    assert sorted(path.name for path in prepared.data.iterdir()) == ["images", "instances"]
    found = prepared.labelled("train")["0.jpg"]
    assert [instance.class_id for instance in found.instances] == [1, 0]
    assert np.argwhere(found.instances[1].mask(8, 8)).tolist() == [
        [y, x] for y in (4, 5, 6) for x in (4, 5, 6)
    ]


def test_a_polygon_that_crosses_itself_is_told_and_kept(prepared: Prepared) -> None:
    pack(prepared.archive, polygons(TRIANGLE, BOW))
    report = prepared.run_sam2()
    (fault,) = report["faults"]
    assert (fault["file"], fault["line"], fault["code"]) == ("labels/train/0.txt", 2, "self_crossing")
    assert len(prepared.labelled("train")["0.jpg"].instances) == 2


def test_an_eight_whose_halves_cancel_out_is_no_sliver(prepared: Prepared) -> None:
    pack(prepared.archive, polygons(TRIANGLE, EIGHT))
    assert prepared.run_sam2()["fault_counts"] == {"self_crossing": 1}
    assert prepared.labelled("train")["0.jpg"].instances[1].mask(100, 100).mean() > 0.2


def test_for_yolo11_nothing_is_said_of_crossings(prepared: Prepared) -> None:
    pack(prepared.archive, polygons(TRIANGLE, BOW))
    assert prepared.run(label_task="segment")["faults"] == []
    assert (prepared.data / "labels/train/0.txt").read_text() == f"{TRIANGLE}\n{BOW}"


def test_slivers_cost_their_line_and_boxes_the_image(prepared: Prepared) -> None:
    files = polygons(TRIANGLE, "0 0.1 0.1 0.5 0.5 0.3 0.3", count=10)
    files["labels/train/1.txt"] = b"0 0.5 0.5 0.2 0.2"
    files["labels/train/2.txt"] = f"{TRIANGLE}\n0 0.5 0.5 0.2 0.2".encode()
    pack(prepared.archive, files)
    report = prepared.run_sam2()
    assert report["fault_counts"] == {"sliver_polygon": 1, "box_in_segment": 1, "mixed_box_polygon": 1}
    found = prepared.labelled("train")
    assert len(found["0.jpg"].instances) == 1
    assert not {"1.jpg", "2.jpg"} & set(found)


def test_an_image_that_only_pillow_reads_is_left_out(prepared: Prepared) -> None:
    """The check for YOLO11 is Pillow's; what SAM2 trains on is decoded by OpenCV."""
    whole = draw(77, size=(64, 64), form="PNG")
    files = polygons(TRIANGLE, count=10)
    files["images/train/9.jpg"] = whole[: whole.rindex(b"IEND") - 4]  # without its end
    pack(prepared.archive, files)
    report = prepared.run_sam2()
    assert report["bad_images"] == 1
    assert report["fault_counts"] == {"image_damaged": 1}


def test_real_sets_are_told_by_their_faults(tmp_path: Path, shared: Path) -> None:
    slivers, mixed, ids = (Prepared(tmp_path / name) for name in ("slivers", "mixed", "ids"))
    pack_folder(slivers.archive, shared / "datasets/defective/sliver_polygons")
    report = slivers.run_sam2(names=["a", "b"])
    assert (report["fault_counts"], report["bad_images"]) == ({"sliver_polygon": 4}, 0)
    assert (
        sum(len(image.instances) for image in slivers.labelled("train").values())
        == (report["splits"]["train"]["instances"])
    )
    pack_folder(mixed.archive, shared / "datasets/defective/mixed_box_polygon")
    with pytest.raises(DatasetInvalidError, match=r"24 of 24 images .*\.txt:\d+: boxes and polygons in one"):
        mixed.run_sam2()
    folder = shared / "datasets/defective/coco91_class_ids_in_80_class_seg/labels_train2017"
    files = {}
    for index, file in enumerate(sorted(folder.iterdir())):
        files[f"labels/train2017/{file.name}"] = file.read_bytes()
        files[f"images/train2017/{file.stem}.jpg"] = draw(index)
    pack(ids.archive, files)
    with pytest.raises(DatasetInvalidError, match=r"19 of 100 images .*class 8\d, but 80 classes are named"):
        ids.run_sam2(names=[f"class {index}" for index in range(80)])


def test_a_real_segmentation_keeps_every_object(prepared: Prepared, shared: Path) -> None:
    pack_folder(prepared.archive, shared / "datasets/coco8-seg")
    report = prepared.run_sam2()
    assert report["fault_counts"] == {}
    found = [image for split in ("train", "val") for image in prepared.labelled(split).values()]
    assert sum(len(image.instances) for image in found) == 30
    masks: list[tuple[Instance, float]] = [
        (instance, float(instance.mask(image.height, image.width).mean()))
        for image in found
        for instance in image.instances
    ]
    assert all(0.0 < covered < 0.9 for _, covered in masks)


def test_the_docs_know_every_fault() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| `(\w+)`[^|]*\| (image left out|line left out|warning) \|", text, re.MULTILINE)
    assert set(rows) == {(kind.code, kind.effect.value) for kind in FaultKind}
