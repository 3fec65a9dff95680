"""A SAM2 training's table and curves."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rvmcv_worker.compute.sam2_curves import curves

BESIDE = {"base/miou": 0.6, "base/miou_click": 0.4, "base/boundary_f": 0.5, "box_as_mask/miou": 0.55}


def epoch(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "epoch": number,
        "epochs": 40,
        "losses": {"total": 2 / number, "mask": 0.02 / number, "dice": 1 / number, "iou": 0.1, "object": 0.0},
        "metrics": {"miou": 0.8 - 0.2 / number, "miou_click": 0.7, "boundary_f": 0.6, **BESIDE},
        "lr": 5e-5 / number,
        "epoch_s": 1.5,
        "eta_s": 9.0,
        **changed,
    }


def drawn(directory: Path, history: list[dict[str, Any]]) -> tuple[list[dict[str, str]], Image.Image]:
    curves(history, directory / "results.csv", directory / "curves.png")
    with (directory / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with Image.open(directory / "curves.png") as picture:
        return rows, picture.convert("RGB")


def pixels_of(picture: Image.Image, colour: str) -> int:
    rgb = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((np.asarray(picture).astype(int) - rgb == 0).all(axis=-1).sum())


def test_the_table_has_a_row_for_each_epoch_with_the_base_model_beside(tmp_path: Path) -> None:
    rows, _ = drawn(tmp_path, [epoch(number) for number in range(1, 41)])

    assert [row["epoch"] for row in rows] == [str(number) for number in range(1, 41)]
    assert list(rows[0]) == [
        *("epoch", "epoch_s", "loss/total", "loss/mask", "loss/dice", "loss/iou", "loss/object", "lr"),
        *("miou", "miou_click", "boundary_f", *BESIDE),
    ]
    second = {name: float(value) for name, value in rows[1].items()}
    assert second["lr"] == 2.5e-5
    assert (second["miou"], second["base/miou"], second["loss/total"]) == (0.7, 0.6, 1.0)


@pytest.mark.parametrize("count", [1, 2, 200])
def test_curves_are_drawn_for_any_number_of_epochs(tmp_path: Path, count: int) -> None:
    _, picture = drawn(tmp_path, [epoch(number) for number in range(1, count + 1)])
    assert picture.size == (1320, 528)
    for colour in ("#0072b2", "#d55e00", "#009e73"):
        assert pixels_of(picture, colour) > 100, "neither line nor point of a metric"
    assert (tmp_path / "curves.png").stat().st_size < 200_000


@pytest.mark.parametrize("beside", ["base/miou_click", "box_as_mask/miou_click"])
def test_what_stands_beside_is_seen(tmp_path: Path, beside: str) -> None:
    alone = [epoch(number, metrics={"miou": 0.8}) for number in (1, 2)]
    _, without = drawn(tmp_path, alone)
    _, with_it = drawn(tmp_path, [entry | {"metrics": {"miou": 0.8, beside: 0.5}} for entry in alone])
    assert pixels_of(without, "#d55e00") == 0
    assert pixels_of(with_it, "#d55e00") > 100


def test_numbers_that_are_not_known_are_empty_and_left_out(tmp_path: Path) -> None:
    broken = epoch(2, metrics={"miou": math.nan, "miou_click": None}, losses={"total": math.inf}, lr=0.0)
    rows, _ = drawn(tmp_path, [epoch(1), broken, epoch(3)])
    assert (rows[1]["miou"], rows[1]["miou_click"], rows[1]["boundary_f"], rows[1]["loss/total"]) == ("",) * 4
    assert rows[1]["lr"] == "0"

    rows, _ = drawn(tmp_path, [broken])
    assert rows[0]["epoch"] == "2"


def test_a_training_without_an_epoch_has_neither(tmp_path: Path) -> None:
    curves([], tmp_path / "results.csv", tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


_DRAW = """
import sys
from pathlib import Path
from rvmcv_worker.compute import ultralytics_env
from rvmcv_worker.compute.sam2_curves import curves
root = Path(sys.argv[1])
ultralytics_env.isolate(root)
entry = {"epoch": 1, "losses": {"total": 1.0}, "metrics": {"miou": 0.5}, "lr": 0.1, "epoch_s": 1.0}
curves([entry], root / "results.csv", root / "curves.png")
"""


@pytest.mark.slow
def test_nothing_is_written_outside_the_childs_directory(tmp_path: Path) -> None:
    child, home = tmp_path / "train", tmp_path / "home"
    child.mkdir()
    home.mkdir(mode=0o500)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    environment["TMPDIR"] = str(tmp_path / "nowhere")
    subprocess.run([sys.executable, "-c", _DRAW, str(child)], env=environment, check=True, cwd=child)
    assert not list(home.iterdir())
    assert {path.name for path in child.iterdir()} == {".config", "results.csv", "curves.png"}
