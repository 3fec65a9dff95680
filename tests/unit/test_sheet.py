from __future__ import annotations

import base64
import io
from dataclasses import replace

import pytest
from PIL import Image, ImageColor

from rvmcv_worker.demo.inferences import detections_of
from rvmcv_worker.demo.questions import Answer
from rvmcv_worker.demo.sheet import (
    GAP_PX,
    HEADER_PX,
    MASK_OPACITY,
    PALETTE,
    TILE_PX,
    Detection,
    Row,
    Truth,
    caption,
    draw_sheet,
    overlap,
)

BOTTLE, CAN = (ImageColor.getrgb(colour) for colour in PALETTE[:2])


@pytest.fixture
def grey(tmp_path):
    path = tmp_path / "grey.png"
    Image.new("RGB", (TILE_PX * 2, TILE_PX), "#808080").save(path)  # half size on the sheet, centred
    return path


def first_tile(rows, path):
    draw_sheet(rows, path, names=["bottle", "can"], title="A title")
    with Image.open(path) as sheet:
        return sheet.crop((GAP_PX, HEADER_PX, GAP_PX + TILE_PX, HEADER_PX + TILE_PX)).convert("RGB")


def test_a_box_lies_where_the_detection_is_in_its_class_colour(grey, tmp_path):
    row = Row(grey, (Detection("can", 0.9, (200, 100, 400, 200)),), ())
    tile = first_tile([row], tmp_path / "sheet.png")
    shift = TILE_PX // 4
    for x, y in ((100, shift + 75), (199, shift + 75), (150, shift + 50), (150, shift + 99)):
        assert tile.getpixel((x, y)) == CAN, (x, y)
    assert tile.getpixel((150, shift + 75)) == (128, 128, 128)
    assert tile.getpixel((95, shift + 75)) == (128, 128, 128)


def test_a_label_is_dashed_black_and_white(grey, tmp_path):
    row = Row(grey, (), (Truth("bottle", (200, 100, 400, 200)),))
    tile = first_tile([row], tmp_path / "sheet.png")
    edge = [tile.getpixel((x, TILE_PX // 4 + 50)) for x in range(100, 200)]
    assert set(edge) == {(0, 0, 0), (255, 255, 255)}


def test_a_class_keeps_its_colour_when_others_are_absent(grey, tmp_path):
    row = Row(
        grey, (Detection("bottle", 0.5, (0, 0, 100, 100)), Detection("tray", 0.5, (300, 0, 400, 100))), ()
    )
    tile = first_tile([row], tmp_path / "sheet.png")
    assert tile.getpixel((0, TILE_PX // 4 + 40)) == BOTTLE
    assert tile.getpixel((150, TILE_PX // 4 + 40)) == ImageColor.getrgb(PALETTE[2])


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (TILE_PX, TILE_PX // 2), "#808080").save(tmp_path / "side.jpg", exif=exif, quality=95)
    row = Row(tmp_path / "side.jpg", (Detection("bottle", 0.9, (0, 0, TILE_PX // 2, TILE_PX)),), ())
    tile = first_tile([row], tmp_path / "sheet.png")
    assert tile.getpixel((TILE_PX // 4, TILE_PX // 2)) == BOTTLE
    assert tile.getpixel((TILE_PX // 4 * 3 - 1, TILE_PX // 2)) == BOTTLE


def test_the_sheet_grows_with_its_rows(grey, tmp_path):
    def size(count):
        path = draw_sheet(
            [Row(grey, (), ())] * count, tmp_path / "sheet.png", names=["bottle"], title="A title"
        )
        with Image.open(path) as sheet:
            return sheet.size

    assert size(4)[0] == size(8)[0] > size(3)[0]
    assert size(4)[1] < size(5)[1] == size(8)[1]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((0, 0, 10, 10), (30, 30, 40, 40), 0.0),
    ],
)
def test_overlap(a, b, expected):
    assert overlap(a, b) == pytest.approx(expected)


def test_captions_count_found_and_surplus(grey):
    truths = Truth("can", (0, 0, 10, 10)), Truth("bottle", (20, 20, 40, 40))
    right = Detection("can", 0.9, (0, 0, 10, 11))
    twice = Detection("can", 0.4, (0, 0, 10, 10))
    wrong_class = Detection("can", 0.8, (20, 20, 40, 40))
    row = Row(grey, (right, twice, wrong_class), truths)
    assert row.found() == 1
    assert caption(row)[0] == "1 of 2 found, 2 too many"
    assert caption(replace(row, detections=()))[0] == "0 of 2 found"
    assert caption(Row(grey, (right,), truths[:1]))[0] == "1 of 1 found"
    assert caption(Row(grey, (), ()))[0] == "nothing there, nothing found"


def test_a_mask_veils_what_it_covers_and_nothing_else(grey, tmp_path):
    mask = Image.new("1", (TILE_PX * 2, TILE_PX))
    mask.paste(1, (200, 100, 300, 200))
    row = Row(grey, (Detection("can", 0.9, (200, 100, 400, 200), mask),), ())
    tile = first_tile([row], tmp_path / "sheet.png")
    shift = TILE_PX // 4
    veiled, free = tile.getpixel((120, shift + 75)), tile.getpixel((180, shift + 75))
    assert free == (128, 128, 128)
    share = MASK_OPACITY / 255
    assert veiled == pytest.approx([128 + share * (c - 128) for c in CAN], abs=2)


def test_an_answer_becomes_detections_with_their_masks():
    mask = Image.new("1", (40, 30))
    mask.putpixel((7, 5), 1)
    png = io.BytesIO()
    mask.save(png, "PNG")
    told = {"class": "can", "confidence": 0.5, "bbox": [1.0, 2.0, 3.0, 4.0]}
    veiled = {**told, "segmentation": base64.b64encode(png.getvalue()).decode()}
    bare, masked = detections_of(Answer({"detections": [told, veiled]}, None, 0.1))
    assert bare == Detection("can", 0.5, (1.0, 2.0, 3.0, 4.0))
    assert masked.mask is not None
    assert masked.mask.size == (40, 30)
    assert masked.mask.getbbox() == (7, 5, 8, 6)
    assert detections_of(Answer(None, {"code": "image_invalid"}, 0.1)) == ()
