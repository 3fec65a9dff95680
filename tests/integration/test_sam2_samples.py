"""Squares and masks of a split, and the batches that are drawn of it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sam2.utils.transforms import SAM2Transforms

from rvmcv_worker.compute.instances import Instance, LabelledImage
from rvmcv_worker.compute.rle import Rle
from rvmcv_worker.compute.sam2_samples import MIN_OBJECT_PX, Flip, Samples
from rvmcv_worker.errors import DatasetInvalidError
from tests import sam2_pictures
from tests.sam2_pictures import instance

PX = 64
FLIPS = [Flip(horizontal, vertical) for horizontal in (False, True) for vertical in (False, True)]
CORNER = (0.05, 0.1, 0.35, 0.5)


def _bright(square: torch.Tensor) -> torch.Tensor:
    return square.mean(0) > 0.2


def _iou(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("flip", FLIPS, ids=str)
@pytest.mark.parametrize("orientation", [1, 6])
def test_masks_lie_where_the_square_shows_the_object(tmp_path: Path, flip: Flip, orientation: int) -> None:
    pixels = sam2_pictures.draw(0, (200, 120), [CORNER])
    labelled = sam2_pictures.save(tmp_path, "a.png", pixels, [CORNER], orientation=orientation)
    samples = Samples(tmp_path, [labelled], PX)
    square, masks = samples.square(0, flip), samples.masks(0, flip=flip)
    assert (square.shape, square.dtype) == ((3, PX, PX), torch.float32)
    assert (masks.shape, masks.dtype) == ((1, PX, PX), torch.bool)
    assert _iou(_bright(square), masks[0]) > 0.9
    assert all(
        _iou(_bright(square), samples.masks(0, flip=other)[0]) < 0.1 for other in FLIPS if other != flip
    )


@pytest.mark.parametrize("flip", FLIPS, ids=str)
def test_a_mirrored_square_is_that_of_the_mirrored_image(tmp_path: Path, flip: Flip) -> None:
    pixels = sam2_pictures.draw(1, (150, 110), [CORNER])
    axes = [axis for axis, mirrored in ((1, flip.horizontal), (0, flip.vertical)) if mirrored]
    upright = sam2_pictures.save(tmp_path, "a.png", pixels, [CORNER])
    mirrored = sam2_pictures.save(tmp_path, "b.png", np.flip(pixels, axes), [CORNER])
    samples = Samples(tmp_path, [upright, mirrored], PX)
    torch.testing.assert_close(samples.square(0, flip), samples.square(1), atol=1e-5, rtol=0)


def test_only_the_chosen_objects_are_drawn(tmp_path: Path) -> None:
    (labelled,) = sam2_pictures.split(tmp_path, [5])
    samples = Samples(tmp_path, [labelled], PX)
    assert torch.equal(samples.masks(0, [3, 1]), samples.masks(0)[[3, 1]])
    assert not torch.equal(samples.masks(0, [3]), samples.masks(0, [1]))


def test_tiny_objects_and_images_without_others_are_left_out_and_counted(tmp_path: Path) -> None:
    good, background, tiny = sam2_pictures.split(tmp_path, [1, 0, 1])
    pixel = instance((0.5, 0.5, 0.5, 0.5))
    run = Instance(0, rle=Rle(640, 640, np.array([1000, 1, 640 * 640 - 1001], np.uint32)))  # 0.01 px of 64
    images = [
        LabelledImage(good.path, good.height, good.width, (pixel, *good.instances, run)),
        background,
        LabelledImage(tiny.path, tiny.height, tiny.width, (pixel, run, instance((0.2, 0.2, 0.21, 0.21)))),
    ]
    samples = Samples(tmp_path, images, PX)
    assert samples.describe() == {"images": 1, "objects": 1, "unused_images": 2, "tiny_objects": 5}
    assert samples.objects(0) == good.instances
    assert samples.labelled(0).instances == (pixel, *good.instances, run)


def test_an_object_of_one_pixel_of_the_decoders_masks_is_not_tiny(tmp_path: Path) -> None:
    (empty,) = sam2_pictures.split(tmp_path, [0])
    small = instance((10 / PX, 10 / PX, 13 / PX, 13 / PX))
    samples = Samples(tmp_path, [LabelledImage(empty.path, empty.height, empty.width, (small,))], PX)
    assert int(samples.masks(0).sum()) == MIN_OBJECT_PX


@pytest.mark.parametrize(
    ("instances", "reason"),
    [
        (None, "the val split has no images"),
        ((), "none of the 1 images of the val split has an object"),
        (
            (instance((0.5, 0.5, 0.5, 0.5)),),
            r"all 1 objects .* smaller than 16 pixels .* 64 x 64.*larger imgsz",
        ),
    ],
)
def test_a_split_without_usable_objects_is_refused(
    tmp_path: Path, instances: tuple[Instance, ...] | None, reason: str
) -> None:
    images = [] if instances is None else [LabelledImage("images/val/a.png", 60, 90, instances)]
    with pytest.raises(DatasetInvalidError, match=reason):
        Samples(tmp_path, images, PX, split="val")


def test_an_image_that_is_not_the_prepared_one_is_refused(tmp_path: Path) -> None:
    (labelled,) = sam2_pictures.split(tmp_path, [1])
    samples = Samples(tmp_path, [labelled], PX)
    Image.new("RGB", (labelled.height, labelled.width)).save(tmp_path / labelled.path)
    with pytest.raises(DatasetInvalidError, match=r"images/train/000\.png: its labels are for 90 x 60"):
        samples.square(0)
    (tmp_path / labelled.path).write_bytes(b"no image")
    with pytest.raises(DatasetInvalidError, match=r"images/train/000\.png: "):
        samples.square(0)


def test_the_square_is_the_predictors_to_the_bit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    labelled = sam2_pictures.save(tmp_path, "a.png", pixels, [CORNER])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the package scripts what torch now compiles
        expected = SAM2Transforms(resolution=PX, mask_threshold=0.0)(pixels)
    assert torch.equal(Samples(tmp_path, [labelled], PX).square(0), expected)


def test_a_real_split_has_masks_for_all_that_is_left(shared: Path, tmp_path: Path) -> None:
    folder = shared / "datasets" / "coco8-seg"
    images = []
    for path in sorted((folder / "images" / "train").iterdir()):
        with Image.open(path) as image:
            width, height = image.size
        lines = (folder / "labels" / "train" / f"{path.stem}.txt").read_text().splitlines()
        polygons = [np.array(line.split()[1:], np.float32).reshape(-1, 2) for line in lines]
        found = tuple(Instance(0, (polygon,)) for polygon in polygons)
        images.append(LabelledImage(f"images/train/{path.name}", height, width, found))
    samples = Samples(folder, images, 256)
    assert samples.object_count + samples.tiny_objects == sum(len(image.instances) for image in images)
    for index in range(len(samples)):
        masks = samples.masks(index)
        assert len(masks) == len(samples.objects(index))
        assert int(masks.sum((1, 2)).min()) >= MIN_OBJECT_PX
        assert bool(samples.square(index).isfinite().all())
