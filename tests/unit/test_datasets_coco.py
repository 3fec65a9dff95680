"""COCO JSON from an archive to the instances that a SAM2 job trains on, or to a report that says why not."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks

from rvmcv_worker.compute.instances import Instance, LabelledImage
from rvmcv_worker.errors import DatasetInvalidError
from tests.coco_fixtures import CATEGORIES, SIZE, TRIANGLE, annotation, coco, coco_set, image
from tests.dataset_fixtures import BOX, Prepared, draw, pack

WIDTH, HEIGHT = SIZE
PIXELS = HEIGHT * WIDTH
FIRST = "train/_annotations.coco.json"


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path / "job")


def first_image(
    prepared: Prepared, *annotations: Any, count: int = 12, **image_changed: Any
) -> dict[str, Any]:
    """Prepare a set whose first train image is the one in question; return the report."""
    files = coco_set(count)
    listed = [image(index, f"train_{index:03d}.jpg") for index in range(count)]
    listed[0] |= image_changed
    files[FIRST] = coco(listed, [*annotations, *(annotation(index) for index in range(1, count))])
    pack(prepared.archive, files)
    return prepared.run_sam2()


def only_fault(report: Mapping[str, Any]) -> tuple[str, str, str]:
    (fault,) = report["faults"]
    assert fault["line"] is None
    return fault["file"], fault["code"], fault["effect"]


def triangle_mask() -> Any:
    points = np.array(TRIANGLE, np.float32).reshape(-1, 2) / np.float32(SIZE)
    return Instance(0, (points,)).mask(HEIGHT, WIDTH)


def test_a_roboflow_set_is_placed_and_reported(prepared: Prepared) -> None:
    files = {f"set/{name}": content for name, content in coco_set(4).items()}
    pack(prepared.archive, {**files, "set/README.roboflow.txt": b"hello"})
    report = prepared.run_sam2()
    assert report["layout"] == (
        "train: set/train/_annotations.coco.json; val: set/valid/_annotations.coco.json"
    )
    assert report["splits"]["train"] == {
        "images": 4,
        "labels": 4,
        "instances": 4,
        "background": 0,
        "without_label_file": 0,
        "per_class": {"bottle": 4, "can": 0},
    }
    assert report["fault_counts"] == {}
    assert sorted(path.name for path in (prepared.root / "prepare").iterdir()) == ["data", "report.json"]
    assert sorted(path.name for path in prepared.data.iterdir()) == ["images", "instances"]
    assert prepared.images("val") == [f"valid_{index:03d}.jpg" for index in range(4)]
    found = prepared.labelled("train")["train_001.jpg"]
    assert (found.path, found.height, found.width) == ("images/train/train_001.jpg", HEIGHT, WIDTH)
    assert (prepared.data / found.path).read_bytes() == files["set/train/train_001.jpg"]
    assert np.array_equal(found.instances[0].mask(HEIGHT, WIDTH), triangle_mask())


@pytest.mark.parametrize(
    ("json_name", "folder", "file_name"),
    [
        ("annotations/instances_{}2017.json", "{}2017", "{}"),
        ("annotations/instances_{}.json", "images/{}", "{}"),
        ("annotations/{}.json", "images/{}", "images/{{split}}/{}"),
        ("{}/annotations.json", "{}/images", "images\\{}"),
        ("{}.json", "pictures", "C:\\data\\pictures\\{}"),
        ("labels/{} set.json", "{}", "/home/me/data/{{split}}/{}"),
        ("annotations/{}_coco.json", "a/b/c/{}", "../a/b/c/{{split}}/./{}"),
    ],
)
def test_images_are_found_where_people_keep_them(
    prepared: Prepared, json_name: str, folder: str, file_name: str
) -> None:
    files = {}
    for number, split in enumerate(("train", "val")):
        names = [f"{number}{index}.JPG" for index in range(3)]
        for index, name in enumerate(names):
            files[f"{folder.format(split)}/{name}"] = draw(10 * number + index)
        shown = [file_name.format(name).format(split=split) for name in names]
        files[json_name.format(split)] = coco(
            [image(index, name) for index, name in enumerate(shown)],
            [annotation(index) for index in range(3)],
        )
    pack(prepared.archive, files)
    report = prepared.run_sam2()
    assert {split: found["images"] for split, found in report["splits"].items()} == {"train": 3, "val": 3}
    assert report["fault_counts"] == {}
    assert prepared.images("train") == ["00.JPG", "01.JPG", "02.JPG"]


def test_a_cvat_set_has_its_val_split_from_the_seed(tmp_path: Path) -> None:
    names = [f"{index}.jpg" for index in range(20)]
    files = {f"images/{name}": draw(index) for index, name in enumerate(names)}
    files["annotations/instances_default.json"] = coco(
        [image(index, name) for index, name in enumerate(names)], [annotation(index) for index in range(20)]
    )
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        prepared = Prepared(tmp_path / str(number))
        pack(prepared.archive, files)
        report = prepared.run_sam2(seed=seed)
        said = f"the data set has no val split: 4 of 20 train images are val, chosen by seed {seed}"
        assert said in report["warnings"]
        chosen.append(prepared.images("val"))
        assert list(prepared.labelled("val")) == chosen[-1]
    assert chosen[0] == chosen[1] != chosen[2]


def test_one_file_without_a_split_follows_the_folders_of_its_images(prepared: Prepared) -> None:
    names = ["train/a.jpg", "train/b.jpg", "val/a.jpg", "c.jpg"]
    files = {f"data/{name}": draw(index) for index, name in enumerate(names)}
    listed = [image(index, name) for index, name in enumerate(names)]
    files["data/labels.json"] = coco(listed, [annotation(index) for index in range(4)])
    pack(prepared.archive, files)
    report = prepared.run_sam2()
    assert (prepared.images("train"), prepared.images("val")) == (["a.jpg", "b.jpg"], ["a.jpg"])
    assert "1 image(s) outside the splits are not used, as 'data/c.jpg'" in report["warnings"]


def test_an_image_is_not_another_splits(prepared: Prepared) -> None:
    """Frames of each split have the same names."""
    files = {
        f"{split}/{index}.jpg": draw(10 * number + index)
        for number, split in enumerate(("train", "val"))
        for index in range(2)
    }
    for split in ("train", "val"):
        files[f"annotations/{split}.json"] = coco(
            [image(index, f"{index}.jpg") for index in range(2)], [annotation(index) for index in range(2)]
        )
    files["annotations/val.json"] = coco(
        [image(0, "0.jpg"), image(1, "1.jpg"), image(2, "2.jpg")], [annotation(1), annotation(0)]
    )
    files["train/2.jpg"] = draw(99)
    pack(prepared.archive, files)
    report = prepared.run_sam2(max_bad_fraction=0.2)
    assert report["fault_counts"] == {"image_missing": 1}
    assert (prepared.data / "images/val/1.jpg").read_bytes() == files["val/1.jpg"]
    assert "1 image(s) that no COCO file lists are not used, as 'train/2.jpg'" in report["warnings"]


def test_an_image_is_not_anothers_by_the_end_of_its_path(prepared: Prepared) -> None:
    files = coco_set(4)
    files["train/cam1/a.jpg"] = draw(50)
    listed = [image(index, f"train_{index:03d}.jpg") for index in range(4)]
    listed += [image(8, "cam2/a.jpg"), image(9, "cam1/a.jpg")]
    files[FIRST] = coco(listed, [*(annotation(index) for index in range(4)), annotation(9, category_id=7)])
    pack(prepared.archive, files)
    report = prepared.run_sam2(max_bad_fraction=0.2)
    assert only_fault(report) == (FIRST, "image_missing", "image left out")
    assert report["faults"][0]["reason"].endswith("(cam2/a.jpg)")
    assert (report["images"], report["bad_images"]) == (10, 1)
    assert [found.class_id for found in prepared.labelled("train")["a.jpg"].instances] == [1]


def test_too_many_images_that_are_not_there_end_the_job(prepared: Prepared) -> None:
    files = coco_set(4)
    del files["train/train_001.jpg"]
    pack(prepared.archive, files)
    with pytest.raises(DatasetInvalidError, match=r"1 of 8 images \(12.5%\) are bad.*train_001.jpg"):
        prepared.run_sam2()


def test_no_image_that_is_there_ends_the_job(prepared: Prepared) -> None:
    files = {name.replace(".jpg", ".png"): content for name, content in coco_set(2).items()}
    pack(prepared.archive, files)
    with pytest.raises(DatasetInvalidError, match="none of the 4 images that COCO files list"):
        prepared.run_sam2(max_bad_fraction=1.0)


def test_run_lengths_of_both_kinds_and_pieces_are_kept(prepared: Prepared) -> None:
    mask = triangle_mask()
    packed = coco_masks.encode(np.asfortranarray(mask.view(np.uint8)))["counts"].decode()
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    far = [42.0, 20.0, 47.0, 20.0, 47.0, 30.0, 42.0, 30.0]
    report = first_image(
        prepared,
        annotation(0, {"size": [HEIGHT, WIDTH], "counts": packed}),
        annotation(0, {"size": [HEIGHT, WIDTH], "counts": counts}, category_id=7),
        annotation(0, [TRIANGLE, far]),
    )
    assert report["fault_counts"] == {}
    one, two, three = prepared.labelled("train")["train_000.jpg"].instances
    assert [one.class_id, two.class_id, three.class_id] == [0, 1, 0]
    assert np.array_equal(one.mask(HEIGHT, WIDTH), mask)
    assert np.array_equal(two.mask(HEIGHT, WIDTH), mask)
    pieces = three.mask(HEIGHT, WIDTH)
    assert pieces[mask].all()
    assert pieces[25, 45]


@pytest.mark.parametrize(
    ("changed", "code", "effect"),
    [
        (
            {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, PIXELS]}},
            "crowd",
            "line",
        ),
        ({"iscrowd": 1, "segmentation": []}, "crowd", "line"),
        ({"segmentation": []}, "no_segmentation", "line"),
        ({"segmentation": None}, "no_segmentation", "line"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [PIXELS]}}, "empty_mask", "line"),
        ({"segmentation": [[1, 1, 5, 5]]}, "polygon_points", "line"),
        ({"segmentation": [[]]}, "polygon_points", "line"),
        ({"segmentation": [[1, 1, 20, 20, 30, 30]]}, "sliver_polygon", "line"),
        ({"segmentation": [TRIANGLE, [1, 1, 2, 2]]}, "piece_left_out", "warning"),
        ({"segmentation": [[2, 2, 40, 28, 40, 2, 2, 27]]}, "self_crossing", "warning"),
        ({"category_id": 2}, "class_out_of_range", "image"),
        ({"category_id": None}, "class_out_of_range", "image"),
        ({"category_id": "1"}, "class_out_of_range", "image"),
        ({"category_id": True}, "class_out_of_range", "image"),
        ({"category_id": 10**4000}, "class_out_of_range", "image"),
        ({"segmentation": [[4, 4, 400, 4, 20, 28]]}, "out_of_bounds", "image"),
        ({"segmentation": [[4, 4, 40, 4, 20, 33]]}, "out_of_bounds", "image"),
        ({"segmentation": [[4, -1, 40, 4, 20, 28]]}, "negative", "image"),
        ({"segmentation": [[4, 4, 1e300, 4, 20, 28]]}, "not_finite", "image"),
        ({"segmentation": [[4, 4, 40, 4, 20]]}, "segmentation_unreadable", "image"),
        ({"segmentation": TRIANGLE}, "segmentation_unreadable", "image"),
        ({"segmentation": [[]] * 10_001}, "segmentation_unreadable", "image"),
        ({"segmentation": "mask.png"}, "segmentation_unreadable", "image"),
        ({"segmentation": [["4", 4, 40, 4, 20, 28]]}, "segmentation_unreadable", "image"),
        ({"segmentation": [[True, 4, 40, 4, 20, 28]]}, "segmentation_unreadable", "image"),
        ({"segmentation": [[10**400, 4, 40, 4, 20, 28]]}, "segmentation_unreadable", "image"),
        ({"segmentation": {"counts": [1]}}, "segmentation_unreadable", "image"),
        ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "segmentation_unreadable", "image"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5]}}, "segmentation_unreadable", "image"),
        ({"segmentation": {"size": [10**9, 10**9], "counts": "P"}}, "segmentation_unreadable", "image"),
        ({"segmentation": {"size": [-1, -1], "counts": [1]}}, "segmentation_unreadable", "image"),
        ({"segmentation": {"size": [1.5, 2], "counts": [3]}}, "segmentation_unreadable", "image"),
        (
            {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [10, PIXELS - 10]}},
            "segmentation_unreadable",
            "image",
        ),
    ],
)
def test_what_is_wrong_with_an_annotation_is_told(
    prepared: Prepared, changed: dict[str, Any], code: str, effect: str
) -> None:
    good = annotation(0, [[10, 10, 20, 10, 20, 20, 10, 20]], id=5)
    report = first_image(prepared, good, annotation(0, **{"id": 17, **changed}))
    (told,) = report["faults"]
    assert (told["file"], told["code"]) == ("train/train_000.jpg", code)
    assert told["effect"].startswith(effect)
    assert "annotation 17" in told["reason"]
    kept = {"image": 0, "line": 1, "warning": 2}[effect]
    assert report["splits"]["train"]["instances"] == 11 + kept
    assert report["bad_images"] == (effect == "image")
    if effect != "image":
        assert len(prepared.labelled("train")["train_000.jpg"].instances) == kept


def test_a_coordinate_off_by_a_hundredth_is_taken(prepared: Prepared) -> None:
    report = first_image(prepared, annotation(0, [[-0.3, 0, WIDTH + 0.4, 0, 20, HEIGHT + 0.3]]))
    assert report["fault_counts"] == {}


def test_an_image_of_which_no_annotation_is_left_does_not_become_background(prepared: Prepared) -> None:
    report = first_image(prepared, annotation(0, []), annotation(0, [[1, 1, 5, 5]]))
    assert report["fault_counts"] == {"nothing_left": 1, "no_segmentation": 1, "polygon_points": 1}
    assert report["bad_images"] == 1
    assert "an annotation of a box alone" in report["faults"][0]["reason"]


def test_an_image_of_a_crowd_alone_or_of_nothing_is_background(prepared: Prepared) -> None:
    report = first_image(prepared, annotation(0, iscrowd=1))
    assert (report["splits"]["train"]["background"], report["bad_images"]) == (1, 0)
    assert prepared.labelled("train")["train_000.jpg"].instances == ()


def test_boxes_alone_end_the_job(prepared: Prepared) -> None:
    files = coco_set(3)
    for split in ("train", "valid"):
        tables = json.loads(files[f"{split}/_annotations.coco.json"])
        for found in tables["annotations"]:
            found["segmentation"] = []
        files[f"{split}/_annotations.coco.json"] = json.dumps(tables).encode()
    pack(prepared.archive, files)
    with pytest.raises(DatasetInvalidError, match=r"6 of 6 images .*an annotation of a box alone"):
        prepared.run_sam2()


def test_the_same_annotation_twice_is_taken_once(prepared: Prepared) -> None:
    report = first_image(prepared, annotation(0), annotation(0, id=101), annotation(0, category_id=7))
    assert only_fault(report) == ("train/train_000.jpg", "duplicate_object", "warning")
    assert report["splits"]["train"]["per_class"] == {"bottle": 12, "can": 1}


def test_an_annotation_of_an_image_that_is_not_listed_is_told(prepared: Prepared) -> None:
    report = first_image(prepared, annotation(0), annotation(99, id=3), annotation("0"))
    assert report["fault_counts"] == {"annotation_without_image": 1, "duplicate_object": 1}
    assert report["faults"][0]["file"] == FIRST
    assert "annotation 3: image_id 99" in report["faults"][0]["reason"]


@pytest.mark.parametrize(
    ("size", "code", "effect"),
    [
        ({"width": WIDTH * 2, "height": HEIGHT * 2}, "image_size_differs", "warning"),
        ({"width": WIDTH * 2.0, "height": HEIGHT}, "image_size_differs", "warning"),
        ({"width": HEIGHT, "height": WIDTH}, "image_size_wrong", "image left out"),
        ({"width": 0, "height": HEIGHT}, "image_size_wrong", "image left out"),
        ({"width": -3, "height": HEIGHT}, "image_size_wrong", "image left out"),
        ({"width": "48", "height": "32"}, "image_size_wrong", "image left out"),
        ({"width": None}, "image_size_wrong", "image left out"),
        ({"width": 10**300, "height": 10**300}, "image_size_wrong", "image left out"),
    ],
)
def test_a_size_that_is_not_the_images(
    prepared: Prepared, size: dict[str, Any], code: str, effect: str
) -> None:
    sides = [size["width"], size["height"]] if effect == "warning" else SIZE
    scaled = np.array(TRIANGLE).reshape(-1, 2) / SIZE * sides
    report = first_image(prepared, annotation(0, [scaled.ravel().tolist()]), **size)
    assert only_fault(report) == ("train/train_000.jpg", code, effect)
    if effect == "warning":
        (found,) = prepared.labelled("train")["train_000.jpg"].instances
        assert np.array_equal(found.mask(HEIGHT, WIDTH), triangle_mask())


def test_no_size_at_all_is_the_images(prepared: Prepared) -> None:
    assert first_image(prepared, annotation(0), width=None, height=None)["fault_counts"] == {}


def test_run_lengths_of_a_listed_size_are_scaled(prepared: Prepared) -> None:
    large = np.zeros((HEIGHT * 2, WIDTH * 2), np.uint8)
    large[10:30, 20:60] = 1
    packed = coco_masks.encode(np.asfortranarray(large))["counts"].decode()
    first_image(
        prepared,
        annotation(0, {"size": [HEIGHT * 2, WIDTH * 2], "counts": packed}),
        width=WIDTH * 2,
        height=HEIGHT * 2,
    )
    (found,) = prepared.labelled("train")["train_000.jpg"].instances
    assert np.argwhere(found.mask(HEIGHT, WIDTH)).tolist() == [
        [y, x] for y in range(5, 15) for x in range(10, 30)
    ]


def turned(seed: int) -> bytes:
    """Return a picture that lies on its side in the file, and is upright by its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.open(io.BytesIO(draw(seed))).save(out, "JPEG", exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("upright", [True, False])
def test_sizes_are_those_of_the_upright_image(prepared: Prepared, upright: bool) -> None:
    files = {**coco_set(12), "train/train_000.jpg": turned(0)}
    listed = [image(index, f"train_{index:03d}.jpg") for index in range(12)]
    if upright:
        listed[0] |= {"width": HEIGHT, "height": WIDTH}
    files[FIRST] = coco(listed, [annotation(index, [[4, 4, 28, 4, 20, 28]]) for index in range(12)])
    pack(prepared.archive, files)
    report = prepared.run_sam2()
    if upright:
        found = prepared.labelled("train")["train_000.jpg"]
        assert (found.height, found.width, report["fault_counts"]) == (WIDTH, HEIGHT, {})
    else:
        assert only_fault(report) == ("train/train_000.jpg", "image_size_wrong", "image left out")


def test_one_id_for_two_images_costs_both(prepared: Prepared) -> None:
    files = coco_set(12)
    listed = [image(max(index, 1), f"train_{index:03d}.jpg") for index in range(12)]
    files[FIRST] = coco(listed, [annotation(index) for index in range(1, 12)])
    pack(prepared.archive, files)
    report = prepared.run_sam2()
    assert report["fault_counts"] == {"image_unclear": 2}
    assert report["bad_images"] == 2


def test_an_image_that_is_listed_again_has_what_both_say(prepared: Prepared) -> None:
    files = coco_set(12)
    listed = [image(index, f"train_{index:03d}.jpg") for index in range(12)]
    listed += [listed[1], image(50, "./train_000.jpg"), image(51, "train_002.jpg", width=96)]
    other = annotation(50, [[10, 10, 20, 10, 20, 20]], category_id=7)
    files[FIRST] = coco(listed, [*(annotation(index) for index in range(12)), other])
    pack(prepared.archive, files)
    report = prepared.run_sam2()
    assert report["fault_counts"] == {"image_listed_again": 2, "image_unclear": 1}
    found = prepared.labelled("train")
    assert [len(found[f"train_{index:03d}.jpg"].instances) for index in (0, 1)] == [2, 1]
    assert "train_002.jpg" not in found


def test_an_image_in_two_splits_is_a_leak(prepared: Prepared) -> None:
    files = {f"images/{index}.jpg": draw(index) for index in range(4)}
    for split, indices in {"train": range(4), "val": range(2)}.items():
        files[f"annotations/instances_{split}.json"] = coco(
            [image(index, f"{index}.jpg") for index in indices], [annotation(index) for index in indices]
        )
    pack(prepared.archive, files)
    report = prepared.run_sam2()
    assert report["leaks"]["train/val"]["equal"] == 2
    assert report["splits"]["val"]["instances"] == 2


def test_classes_follow_the_ids_and_the_project_is_none(prepared: Prepared) -> None:
    files = coco_set(4)
    categories = [
        {"id": 90, "name": "can", "supercategory": "garbage"},
        {"id": 0, "name": "garbage", "supercategory": "none"},
        {"id": 13, "name": "bottle", "supercategory": "garbage"},
    ]
    for split in ("train", "valid"):
        tables = json.loads(files[f"{split}/_annotations.coco.json"])
        for found in tables["annotations"]:
            found["category_id"] = 13 if found["image_id"] else 90
        files[f"{split}/_annotations.coco.json"] = json.dumps({**tables, "categories": categories}).encode()
    pack(prepared.archive, files)
    report = prepared.run_sam2(names=["other"])
    assert report["names"] == ["bottle", "can"]
    assert report["splits"]["train"]["per_class"] == {"bottle": 3, "can": 1}
    assert "category 'garbage' is above others and has no object: it is no class" in report["warnings"]
    assert any("the job's class names differ" in warning for warning in report["warnings"])


def test_a_project_of_the_name_of_its_class_is_none_either(prepared: Prepared) -> None:
    files = coco_set(3)
    categories = [
        {"id": 0, "name": "bottle", "supercategory": "none"},
        {"id": 1, "name": "bottle", "supercategory": "bottle"},
    ]
    for split in ("train", "valid"):
        tables = json.loads(files[f"{split}/_annotations.coco.json"])
        files[f"{split}/_annotations.coco.json"] = json.dumps({**tables, "categories": categories}).encode()
    pack(prepared.archive, files)
    assert prepared.run_sam2()["names"] == ["bottle"]


def test_a_class_of_its_own_name_above_stays_without_objects(prepared: Prepared) -> None:
    """As COCO's person."""
    files = coco_set(3)
    categories = [*CATEGORIES, {"id": 9, "name": "person", "supercategory": "person"}]
    for split in ("train", "valid"):
        tables = json.loads(files[f"{split}/_annotations.coco.json"])
        files[f"{split}/_annotations.coco.json"] = json.dumps({**tables, "categories": categories}).encode()
    pack(prepared.archive, files)
    assert prepared.run_sam2()["names"] == ["bottle", "can", "person"]


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1, "name": "glass"}], "category 1 is 'bottle' in train/.* and 'glass' in valid/"),
        ([], ""),
        ([{"id": 1}], r"categories\[0\] needs a whole number as id and a name"),
        ([{"id": "1", "name": "x"}], r"categories\[0\] needs"),
        ([{"id": 1, "name": "bottle"}, {"id": 1, "name": "x"}], r"categories\[1\]: id 1 is 'x' here"),
        ([{"id": 5, "name": "can"}], "'can' is the name of two classes"),
        ([{"id": 5, "name": " "}], "has no name"),
        ([7], r"categories\[0\] is not an object"),
    ],
)
def test_categories_must_agree(prepared: Prepared, categories: list[Any], message: str) -> None:
    files = coco_set(3)
    tables = json.loads(files["valid/_annotations.coco.json"])
    files["valid/_annotations.coco.json"] = json.dumps({**tables, "categories": categories}).encode()
    pack(prepared.archive, files)
    if not message:  # those of the other file will do
        assert prepared.run_sam2()["names"] == ["bottle", "can"]
        return
    with pytest.raises(DatasetInvalidError, match=message):
        prepared.run_sam2()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the train split has no usable image"),
        (b"[]", "no usable image. First faults: .* are not of COCO.* as train/_annotations"),
        (b"{", "cut off|is missing|Expecting"),
        (coco([], [])[:-1], "the file is cut off"),
        (coco([image(0, "a.jpg")], [annotation(0)])[:200], "cannot be read as JSON"),
        (coco([image(0, "a.jpg")], [annotation(0, [[float("nan")] * 6])]), "NaN is no number of JSON's"),
        (coco([image(0, "a.jpg")], [annotation(0, [[float("inf")] * 6])]), "Infinity is no number of JSON's"),
        (b'{"images": ' + b"[" * 100_000, "nested too deep"),
        (b'{"images": [], "x": ' + b'{"a":' * 100_000, "nested too deep"),
        (b'{"images": [{"id": ' + b"9" * 5000 + b"}]}", "a number of thousands of digits"),
        (
            b'{"images": [{"id": 1, "file_name": "' + b"x" * 2000 + b'"}]}',
            r"\[0\] needs an id and a file_n",
        ),
        (b'{"images": [{"file_name": "a"}]}', r"images\[0\] needs an id"),
        (b'{"images": [{"id": [1], "file_name": "a"}]}', r"images\[0\] needs an id"),
        (b'{"images": [3]}', r"images\[0\] is not an object"),
        (b'{"annotations": [{"id": 3}]}', r"annotations\[0\] has no image_id"),
        (b'{"images": [], "images"}', "':' is missing"),
        (b'{"images": [],}', "a key is no text|Expecting"),
        (b"{1: 2}", "a key is no text"),
        (b'{"images": [1 2]}', "is not an object"),
        (b'{"info": [1], "images": [{} {}]}', "needs an id"),
        (b'{"images": []} x', "something follows"),
        (b'{"images": [{"id": 1, "file_name": "\xff"}]}', "not UTF-8"),
        (coco([], []).decode().encode("utf-16"), "not UTF-8"),
    ],
)
def test_hostile_json_is_refused_with_a_reason(prepared: Prepared, content: bytes, message: str) -> None:
    pack(prepared.archive, {**coco_set(2), FIRST: content})
    with pytest.raises(DatasetInvalidError, match=message) as caught:
        prepared.run_sam2()
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()


def test_other_json_is_left_alone(prepared: Prepared) -> None:
    files = {**coco_set(2), "package.json": b"{]", "a.json": b'{"shapes": []}', "list.json": b"[1, NaN]"}
    files["annotations/captions_train.json"] = b'{"images": [], "annotations": []}'
    pack(prepared.archive, files)
    report = prepared.run_sam2()
    assert report["splits"]["train"]["images"] == 2
    assert [warning for warning in report["warnings"] if "not read: package.json" in warning]


def test_of_cocos_own_files_the_instances_count(prepared: Prepared) -> None:
    files = {}
    for number, split in enumerate(("train", "val")):
        files |= {f"{split}2017/{number}{index}.jpg": draw(10 * number + index) for index in range(3)}
        listed = [image(index, f"{number}{index}.jpg") for index in range(3)]
        found = [annotation(index) for index in range(3)]
        files[f"annotations/instances_{split}2017.json"] = coco(listed, found)
        keypoints = [found | {"keypoints": [0] * 51} for found in found]
        files[f"annotations/person_keypoints_{split}2017.json"] = coco(
            listed, keypoints, [{"id": 1, "name": "person"}]
        )
    pack(prepared.archive, files)
    report = prepared.run_sam2()
    assert report["names"] == ["bottle", "can"]
    assert any("2 other file(s) of COCO's format are not used" in warning for warning in report["warnings"])


def with_yolo(files: dict[str, bytes], text: bytes) -> dict[str, bytes]:
    labels = {name.replace(".jpg", ".txt"): text for name in files if name.endswith(".jpg")}
    return {**files, **labels, "data.yaml": b"names: [x]"}


POLYGON = b"0 0.1 0.1 0.5 0.1 0.3 0.6\n"


def test_coco_counts_before_label_files(prepared: Prepared) -> None:
    pack(prepared.archive, with_yolo(coco_set(3), POLYGON))
    report = prepared.run_sam2()
    assert report["names"] == ["bottle", "can"]
    assert any(
        warning.startswith(
            "labels are taken from train/_annotations.coco.json, valid/_annotations.coco.json: the 6"
        )
        for warning in report["warnings"]
    )


def test_label_files_count_before_coco_of_boxes_alone(prepared: Prepared) -> None:
    files = coco_set(3)
    for split in ("train", "valid"):
        tables = json.loads(files[f"{split}/_annotations.coco.json"])
        tables["annotations"] = [{**found, "segmentation": []} for found in tables["annotations"]]
        files[f"{split}/_annotations.coco.json"] = json.dumps(tables).encode()
    pack(prepared.archive, with_yolo(files, POLYGON))
    report = prepared.run_sam2()
    assert report["names"] == ["x"]
    assert report["splits"]["train"]["instances"] == 3
    assert any("has boxes alone: the label files" in warning for warning in report["warnings"])


def test_a_yolo11_job_says_what_takes_coco(prepared: Prepared) -> None:
    pack(prepared.archive, {**coco_set(2), "data.yaml": b"names: [x]"})
    with pytest.raises(
        DatasetInvalidError,
        match=r"found 2 \.json \(COCO or LabelMe\), which must be converted to YOLO's format first\. "
        "A sam2 job takes COCO's as it is",
    ):
        prepared.run(label_task="segment")


def test_a_sam2_job_of_neither_says_what_it_takes(prepared: Prepared) -> None:
    pack(prepared.archive, {"a.jpg": draw(0), "a.json": b'{"shapes": []}', "data.yaml": b"names: [x]"})
    with pytest.raises(DatasetInvalidError, match="or a COCO JSON with images, annotations and categories"):
        prepared.run_sam2()


def test_boxes_of_yolo_are_no_segmentation(prepared: Prepared) -> None:
    pack(prepared.archive, {"a.jpg": draw(0), "a.txt": BOX, "data.yaml": b"names: [x]"})
    with pytest.raises(
        DatasetInvalidError, match=r"1 of 1 images .* boxes where a segmentation needs polygons"
    ):
        prepared.run_sam2()


def as_coco(folder: Path, split: str, labelled: dict[str, LabelledImage], *, packed: bool) -> bytes:
    """Return a split of a set in YOLO's format as COCO's tools would write it."""
    images, annotations = [], []
    for image_id, (name, found) in enumerate(labelled.items()):
        images.append(image(image_id, name, width=found.width, height=found.height))
        for line in (folder / "labels" / split / name).with_suffix(".txt").read_text().splitlines():
            class_id, *numbers = line.split()
            points = np.array(numbers, float).reshape(-1, 2) * (found.width, found.height)
            segmentation: Any = [points.round(2).ravel().tolist()]
            if packed:
                (rle,) = coco_masks.frPyObjects(segmentation, found.height, found.width)
                segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            annotations.append(
                annotation(image_id, segmentation, id=len(annotations), category_id=10 * int(class_id))
            )
    return coco(images, annotations, [{"id": 10 * index, "name": f"class {index}"} for index in range(6)])


def test_a_real_set_is_the_same_as_coco(tmp_path: Path, shared: Path) -> None:
    """Train as polygons, val as run lengths: masks differ in pixels of the border only."""
    folder = shared / "datasets" / "garbage_seg"
    yolo, converted = Prepared(tmp_path / "yolo"), Prepared(tmp_path / "coco")
    kept = {file.stem for split in ("train", "val") for file in sorted(folder.glob(f"images/{split}/*"))[::3]}
    files = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*.*")
        if file.stem in kept or file.name == "data.yaml"
    }
    pack(yolo.archive, files)
    expected = yolo.run_sam2()["splits"]
    files = {name: content for name, content in files.items() if name.startswith("images/")}
    for split in ("train", "val"):
        files[f"annotations/{split}.json"] = as_coco(
            folder, split, yolo.labelled(split), packed=split == "val"
        )
    pack(converted.archive, files)
    report = converted.run_sam2()
    assert sum(found["instances"] for found in expected.values()) > 150
    for split, found in expected.items():
        assert list(found["per_class"].values()) == list(report["splits"][split]["per_class"].values())
    assert report["fault_counts"] == {}
    for split in ("train", "val"):
        theirs = converted.labelled(split)
        for name, found in yolo.labelled(split).items():
            assert len(found.instances) == len(theirs[name].instances)
            for one, other in zip(found.instances, theirs[name].instances, strict=True):
                assert one.class_id == other.class_id
                drawn = [instance.mask(found.height, found.width) for instance in (one, other)]
                (outline,) = (polygon * (found.width, found.height) for polygon in one.polygons)
                border = np.zeros((found.height, found.width), np.uint8)
                cv2.polylines(border, [outline.astype(np.int32)], isClosed=True, color=1, thickness=3)
                assert not np.any((drawn[0] ^ drawn[1]) & ~border.view(np.bool_))
