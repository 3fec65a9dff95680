from __future__ import annotations

import json

import pytest

from rvmcv_worker.compute.sam2_score import Fit, Score, improved, report, verdict
from rvmcv_worker.errors import DatasetInvalidError

NAMES = ["bottle", "can", "crate"]


def score(miou: float, click: float | None = 0.5, boundary_f: float = 0.4) -> Score:
    return Score.of([[Fit(miou, click, boundary_f)]], [[0]], NAMES, left_out=0)


def test_means_are_over_objects_and_by_class() -> None:
    fits = [
        [Fit(1.0, 0.5, 0.25), Fit(0.5, 0.25, 0.0), Fit(0.0, 0.0, 0.5)],
        [None],
        [None, Fit(0.5, 0.25, 0.25)],
    ]

    measured = Score.of(fits, [[0, 0, 2], [1], [0, 0]], NAMES, left_out=3)

    assert (measured.miou, measured.miou_click, measured.boundary_f) == (0.5, 0.25, 0.25)
    assert (measured.instances, measured.left_out) == (4, 5)
    assert measured.per_class == {
        "bottle": {
            "images": 2,
            "instances": 3,
            "miou": pytest.approx(2 / 3),
            "miou_click": pytest.approx(1 / 3),
            "boundary_f": pytest.approx(1 / 6),
        },
        "can": {"images": 0, "instances": 0, "miou": None, "miou_click": None, "boundary_f": None},
        "crate": {"images": 1, "instances": 1, "miou": 0.0, "miou_click": 0.0, "boundary_f": 0.5},
    }


def test_where_nothing_can_be_measured_it_is_the_data_sets_fault() -> None:
    with pytest.raises(DatasetInvalidError, match="label larger ones"):
        Score.of([[None]], [[0]], NAMES, left_out=0)


def test_the_flat_form_has_what_was_measured() -> None:
    assert score(0.75).flat() == {"miou": 0.75, "miou_click": 0.5, "boundary_f": 0.4}
    assert score(0.75, click=None).flat("box_as_mask/") == {
        "box_as_mask/miou": 0.75,
        "box_as_mask/boundary_f": 0.4,
    }


@pytest.mark.parametrize(
    ("best", "better"), [(0.731, False), (0.7301, False), (0.7315, False), (0.733, True), (0.5, False)]
)
def test_only_more_than_rounding_is_better(best: float, better: bool) -> None:
    assert improved(score(best), score(0.731)) is better


def test_the_verdict_says_so_in_so_many_words() -> None:
    base, box = score(0.731, 0.602, 0.4), score(0.655, None, 0.1)

    assert verdict(score(0.812, 0.7, 0.55), base, box) == (
        "better than the base model on val: mIoU with boxes 0.812 (base 0.731, the box itself 0.655), "
        "with one click 0.700 (base 0.602), boundary F 0.550 (base 0.400); 1 object"
    )
    worse = verdict(score(0.7), base, box)
    assert worse.startswith("NOT better than the base model on val: mIoU with boxes 0.700 (base 0.731, ")
    assert worse.endswith("; do not activate it without looking at masks.jpg")
    useless = verdict(score(0.3), score(0.2), box)
    assert useless.startswith("better than the base model on val, but not than the box itself: ")
    assert useless.endswith("; do not activate it without looking at masks.jpg")


def test_a_report_has_the_best_epoch_and_what_stands_beside_it() -> None:
    best, base, box = score(0.8), score(0.7), score(0.6, None)

    told = report(best, base, box, best_epoch=4)

    assert told["miou"] == told["fitness"] == 0.8
    assert told["improved"] is True
    assert told["best_epoch"] == 4
    assert told["base"]["miou"] == 0.7
    assert told["box_as_mask"]["miou_click"] is None
    assert set(told) == {
        *("miou", "miou_click", "boundary_f", "fitness", "instances", "left_out", "per_class"),
        *("base", "box_as_mask", "improved", "verdict", "best_epoch"),
    }
    assert json.loads(json.dumps(told, allow_nan=False)) == told
