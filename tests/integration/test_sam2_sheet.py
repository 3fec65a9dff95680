"""The sheet of masks before and after a SAM2 training."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rvmcv_worker.compute import sam2_checkpoint, sam2_sheet_picture
from rvmcv_worker.compute.annotate import COLORS
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.compute.sam2_proof import Proof
from rvmcv_worker.compute.sam2_samples import Samples
from rvmcv_worker.compute.sam2_sheet import Sheet, spread
from rvmcv_worker.compute.sam2_sheet_picture import Found, Row, draw
from rvmcv_worker.sam2_options import Sam2Options
from tests import sam2_files, sam2_pictures

EDGE_PX = 64
CELL, GAP, HEADER = sam2_sheet_picture._CELL_PX, sam2_sheet_picture._GAP_PX, sam2_sheet_picture._HEADER_PX


def test_images_are_spread_evenly_from_the_first_to_the_last() -> None:
    assert spread(3) == [0, 1, 2]
    assert spread(6) == [0, 1, 2, 3, 4, 5]
    assert spread(101) == [0, 20, 40, 60, 80, 100]
    for count in range(1, 60):
        chosen = spread(count)
        assert len(chosen) == len(set(chosen)) == min(count, 6), count


def cells(picture: bytes) -> list[NDArray[np.int64]]:
    """Return the four cells of a sheet's first row, (360, 360, 3) RGB."""
    with Image.open(io.BytesIO(picture)) as opened:
        assert opened.format == "JPEG"
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    lefts = [GAP + column * (CELL + GAP) for column in range(4)]
    return [pixels[HEADER : HEADER + CELL, left : left + CELL] for left in lefts]


def mask(height: int, width: int, *, left: float = 0.25, right: float = 0.75) -> NDArray[np.bool_]:
    made = np.zeros((height, width), bool)
    made[height // 4 : 3 * height // 4, round(left * width) : round(right * width)] = True
    return made


def row(*truth: NDArray[np.bool_], **changed: object) -> Row:
    settings = {
        "name": "a.jpg",
        "image": np.full((120, 120, 3), 255, np.uint8),
        "classes": [2],
        "truth": truth,
        "before": None,
        "after": None,
    }
    return Row(**{**settings, **changed})  # type: ignore[arg-type]


def test_masks_are_where_they_are_in_the_colour_of_their_class() -> None:
    before = Found([mask(240, 240, right=0.5)], [0.5])
    after = Found([mask(240, 240)], [1.0])
    image, truth, worse, better = cells(
        draw([row(mask(240, 240), before=before, after=after)], ["a", "b", "c"], "title", "subtitle")
    )
    tint = np.array(COLORS.by_idx(2).as_rgb())
    covered = 0.45 * tint + 0.55 * 255
    left, right, outside = np.s_[110:130, 110:150], np.s_[110:130, 210:250], np.s_[20:60, 20:60]
    for cell, area, expected in [
        (image, left, 255),
        (truth, left, covered),
        (truth, right, covered),
        (worse, left, covered),
        (worse, right, 255),
        (better, right, covered),
        (better, outside, 255),
    ]:
        assert np.abs(cell[area].reshape(-1, 3).mean(0) - expected).max() < 6


def test_a_model_that_was_not_asked_has_a_blank_cell() -> None:
    *_, before, after = cells(draw([row(mask(60, 60))], ["a", "b", "c"], "title", "subtitle"))
    for cell in (before, after):
        assert np.abs(cell - (0xD9, 0xDC, 0xE1)).max() < 6


def test_odd_rows_are_drawn() -> None:
    """A strip of one pixel's height, hundreds of objects, none, empty masks, names that say too much."""
    many = [mask(50, 50, left=part / 400, right=part / 400 + 0.1) for part in range(300)]
    empty = np.zeros((9, 7), bool)
    rows = [
        row(mask(1, 900), image=np.zeros((1, 900, 3), np.uint8), classes=[0]),
        row(*many, classes=[0] * 300, after=Found(many, [1.0] * 300)),
        row(classes=[], before=Found([], []), after=Found([], [])),
        row(empty, classes=[1], after=Found([empty], [0.0]), name="\x1b[31m" + "x" * 5000),
    ]
    with Image.open(io.BytesIO(draw(rows, ["瓶子" * 50, "\u202eback"], "title", "subtitle"))) as opened:
        assert opened.width == 4 * (CELL + GAP) + GAP


def test_its_size_and_memory_are_bounded_whatever_the_images_are() -> None:
    dice = np.random.default_rng(0)

    def rows() -> Iterator[Row]:
        for _ in range(6):
            image = dice.integers(0, 255, (2000, 2000, 3), np.uint8)
            truth = [mask(1024, 1024) for _ in range(20)]
            yield row(*truth, image=image, classes=[0] * 20)

    tracemalloc.start()
    picture = draw(rows(), ["a"], "title", "subtitle")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(picture) <= 2_000_000
    assert peak_bytes < 120_000_000  # one image and its masks at a time, and the sheet


@pytest.fixture(scope="module")
def network() -> Network:
    model = sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=EDGE_PX)
    model.load_state_dict(sam2_files.weights())
    return Network(model, "decoder", torch.device("cpu"))


def test_a_sheet_shows_what_two_models_make_of_a_split(
    tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = sam2_pictures.split(tmp_path, [2, 1, 3, 1, 2, 1, 4, 2])
    samples = Samples(tmp_path, labelled, EDGE_PX, split="val")
    memory = Memory(Sam2Options(imgsz=EDGE_PX), network.device, print)
    proof = Proof(samples, None, ["thing"], memory, lambda: None, lambda _done, _of: None)
    told: list[Row] = []

    def drawn(rows: Iterator[Row], names: list[str], *, title: str, subtitle: str) -> bytes:
        told.extend(rows)
        assert subtitle.startswith("6 of 8 images, evenly spread")
        return draw(told, names, title, subtitle)

    monkeypatch.setattr("rvmcv_worker.compute.sam2_sheet.draw", drawn)
    sheet = Sheet(samples, ["thing"])
    sheet.before(proof, network)
    with torch.no_grad():
        for weight in network.model.sam_mask_decoder.output_hypernetworks_mlps.parameters():
            weight.add_(0.05)
    sheet.after(proof, network)
    sheet.write(tmp_path / "masks.jpg")

    chosen = [0, 1, 3, 4, 6, 7]
    assert [each.name for each in told] == [f"{index:03d}.png" for index in chosen]
    for index, each in zip(chosen, told, strict=True):
        now = proof.masks(network, index)
        assert each.before is not None
        assert each.after is not None
        np.testing.assert_array_equal(list(each.after.masks), now)
        assert not np.array_equal(list(each.before.masks), now)
        truth = [labelled.mask(*now[0].shape) for labelled in samples.objects(index)]
        for found in (each.before, each.after):
            shared = [(a & b).sum() / (a | b).sum() for a, b in zip(found.masks, truth, strict=True)]
            np.testing.assert_allclose(found.ious, shared)
    with Image.open(tmp_path / "masks.jpg") as opened:
        assert (opened.format, opened.width) == ("JPEG", 4 * (CELL + GAP) + GAP)
