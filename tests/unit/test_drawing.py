from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest

from rvmcv_worker.demo.drawing import box_line, draw_dataset, draw_zip, polygon_line
from rvmcv_worker.demo.scene import VISIBLE_SHARE, draw_scene, largest_piece

SIZE_PX = 128


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(np.random.default_rng([7, i]), SIZE_PX) for i in range(60)]


@pytest.fixture(scope="module")
def items(scenes):
    return [item for scene in scenes for item in scene.items]


def test_layout_is_yolos(tmp_path):
    yaml = draw_dataset(tmp_path / "set", train=3, val=2, test=1, size_px=96, seed=1)
    assert yaml.read_text() == (
        "train: images/train\nval: images/val\ntest: images/test\nnames:\n  0: bottle\n  1: can\n"
    )
    files = sorted(str(path.relative_to(yaml.parent)) for path in yaml.parent.rglob("*.*"))
    images = [
        "images/test/0000",
        *(f"images/train/000{i}" for i in range(3)),
        "images/val/0000",
        "images/val/0001",
    ]
    labels = [name.replace("images", "labels") + ".txt" for name in images]
    assert files == ["data.yaml", *(name + ".jpg" for name in images), *labels]
    pixels = cv2.imread(str(yaml.parent / "images/train/0000.jpg"))
    assert pixels.shape == (96, 96, 3)


def test_a_split_without_pictures_is_not_named(tmp_path):
    yaml = draw_dataset(tmp_path, train=1, val=1, test=0, size_px=64, seed=0)
    assert "test" not in yaml.read_text()
    assert not (tmp_path / "images/test").exists()


def test_the_seed_decides_every_byte(tmp_path):
    def sha256(name, seed):
        path = draw_zip(tmp_path / name, train=3, val=1, test=0, size_px=64, seed=seed)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert sha256("a.zip", 4) == sha256("b.zip", 4)
    assert sha256("a.zip", 4) != sha256("c.zip", 5)


def test_a_larger_set_holds_the_smaller(tmp_path):
    small = zipfile.ZipFile(draw_zip(tmp_path / "a.zip", train=2, val=1, test=0, size_px=64, seed=3))
    large = zipfile.ZipFile(draw_zip(tmp_path / "b.zip", train=4, val=2, test=1, size_px=64, seed=3))
    with small, large:
        for name in small.namelist():
            if name != "data.yaml":
                assert large.read(name) == small.read(name), name


def test_splits_share_no_picture(tmp_path):
    with zipfile.ZipFile(draw_zip(tmp_path / "a.zip", train=5, val=5, test=5, size_px=64, seed=3)) as archive:
        pictures = [archive.read(name) for name in archive.namelist() if name.endswith(".jpg")]
    assert len(set(pictures)) == 15


def test_both_classes_company_and_empty_pictures_occur(scenes, items):
    classes = [item.class_id for item in items]
    assert min(classes.count(0), classes.count(1)) >= 15
    assert {0, 1, 2, 3} == {len(scene.items) for scene in scenes}


def test_pictures_use_the_range_of_light(scenes):
    means = [float(scene.picture.mean()) for scene in scenes]
    assert min(means) < 90
    assert max(means) > 150
    assert all(scene.picture.std() > 4 for scene in scenes)


def test_boxes_are_tight_around_what_is_visible(items):
    for item in items:
        class_id, *numbers = box_line(item).split()
        x, y, width, height = (float(number) * SIZE_PX for number in numbers)
        left, top, right, bottom = (
            round(edge) for edge in (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        )
        inside = item.visible[top:bottom, left:right]
        assert int(class_id) == item.class_id
        assert inside.sum() == item.visible.sum()
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_polygons_cover_what_is_visible(items):
    for item in items:
        numbers = [float(number) for number in polygon_line(item).split()[1:]]
        assert len(numbers) >= 6
        assert all(0 <= number <= 1 for number in numbers)
        corners = np.array(numbers).reshape(-1, 2) * SIZE_PX - 0.5
        mask = (
            cv2.fillPoly(np.zeros((SIZE_PX, SIZE_PX), np.uint8), [np.round(corners).astype(np.int32)], 1) > 0
        )
        assert (mask & item.visible).sum() >= 0.97 * item.visible.sum()
        # A polygon has no holes: what lies in front of an object's middle is inside its outline.
        assert (mask & ~item.visible).sum() <= (1.05 - VISIBLE_SHARE) * mask.sum()


def test_segment_labels_hold_the_same_objects(tmp_path):
    boxes = draw_dataset(tmp_path / "a", train=6, val=0, test=0, size_px=96, seed=2).parent
    polygons = draw_dataset(tmp_path / "b", train=6, val=0, test=0, size_px=96, seed=2, segment=True).parent
    for path in sorted((boxes / "labels/train").iterdir()):
        lines = (polygons / "labels/train" / path.name).read_text().splitlines()
        assert [line.split()[0] for line in lines] == [line[0] for line in path.read_text().splitlines()]
        assert all(len(line.split()) % 2 == 1 for line in lines)


def test_objects_are_never_hidden_beyond_recognition(items):
    for item in items:
        assert item.visible.sum() >= 0.97 * VISIBLE_SHARE * item.extent_px
        assert largest_piece(item.visible).sum() == item.visible.sum()


def test_no_pixel_belongs_to_two_objects(scenes):
    for scene in scenes:
        if scene.items:
            assert np.sum([item.visible for item in scene.items], axis=0).max() == 1


def test_drawing_does_without_torch():
    code = "import sys, rvmcv_worker.demo.drawing, rvmcv_worker.demo.sheet, rvmcv_worker.demo.run; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "False\n", done.stderr
