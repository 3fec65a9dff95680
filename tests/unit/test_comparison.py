from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rvmcv_worker.comparison import Box, Seen, Thresholds, compare, iou, scaled

USUAL = Thresholds(iou=0.5, confidence_difference=0.3, confidence=0.25)
LEFT: Box = (0.0, 0.0, 100.0, 100.0)
RIGHT: Box = (200.0, 0.0, 300.0, 100.0)


def _codes(edge: list[Seen], server: list[Seen], thresholds: Thresholds = USUAL) -> list[str]:
    return [reason["code"] for reason in compare(edge, server, thresholds)["reasons"]]


def test_what_both_see_alike_is_no_mismatch() -> None:
    told = compare([Seen("PET", 0.9, LEFT)], [Seen("PET", 0.8, (5.0, 0.0, 105.0, 100.0))], USUAL)
    assert told["mismatch"] is False
    assert told["reasons"] == []
    assert told["matches"] == [
        {"edge": 0, "server": 0, "iou": 0.9048, "class_agrees": True, "confidence_difference": 0.1}
    ]
    assert (told["class_agreement"], told["mean_iou"]) == (1.0, 0.9048)
    assert told["thresholds"] == {"iou": 0.5, "confidence_difference": 0.3, "confidence": 0.25}


def test_nothing_on_both_sides_is_no_mismatch() -> None:
    told = compare([], [], USUAL)
    assert (told["mismatch"], told["class_agreement"], told["mean_iou"]) == (False, None, None)


@pytest.mark.parametrize(
    ("edge", "server", "codes"),
    [
        ([Seen("PET", 0.9, LEFT)], [], ["missing_at_server"]),
        ([], [Seen("PET", 0.9, LEFT)], ["missing_at_edge"]),
        ([Seen("PET", 0.9, LEFT)], [Seen("HDPE", 0.9, LEFT)], ["class_differs"]),
        ([Seen("PET", 0.9, LEFT)], [Seen("PET", 0.5, LEFT)], ["confidence_differs"]),
        ([Seen("PET", 0.9, LEFT)], [Seen("PET", 0.9, RIGHT)], ["missing_at_server", "missing_at_edge"]),
        ([Seen("PET", 0.9)], [Seen("HDPE", 0.9, LEFT)], ["missing_at_server", "missing_at_edge"]),
    ],
)
def test_each_kind_of_difference_has_its_code(edge: list[Seen], server: list[Seen], codes: list[str]) -> None:
    assert _codes(edge, server) == codes


def test_what_the_machine_saw_below_the_jobs_threshold_is_not_missed() -> None:
    strict = Thresholds(iou=0.5, confidence_difference=0.3, confidence=0.75)
    told = compare([Seen("PET", 0.6, LEFT)], [], strict)
    assert (told["edge_only"], told["mismatch"]) == ([0], False)


def test_a_reason_says_what_each_side_saw() -> None:
    (reason,) = compare([Seen("PET", 0.9, LEFT)], [Seen("HDPE", 0.9, LEFT)], USUAL)["reasons"]
    assert reason["message"] == "the machine saw PET where the server sees HDPE"


def test_two_boxes_over_one_object_are_matched_by_class_first() -> None:
    edge = [Seen("PET", 0.9, LEFT)]
    server = [Seen("HDPE", 0.9, LEFT), Seen("PET", 0.9, (0.0, 0.0, 100.0, 80.0))]
    told = compare(edge, server, USUAL)
    assert [(match["edge"], match["server"]) for match in told["matches"]] == [(0, 1)]
    assert told["server_only"] == [0]


def test_of_equal_classes_the_boxes_that_overlap_most_go_together() -> None:
    edge = [Seen("PET", 0.9, (0.0, 0.0, 100.0, 100.0)), Seen("PET", 0.9, (30.0, 0.0, 130.0, 100.0))]
    server = [Seen("PET", 0.9, (28.0, 0.0, 128.0, 100.0)), Seen("PET", 0.9, (2.0, 0.0, 102.0, 100.0))]
    told = compare(edge, server, USUAL)
    assert [(match["edge"], match["server"]) for match in told["matches"]] == [(0, 1), (1, 0)]


def test_without_a_box_the_most_confident_of_the_class_are_matched_once_each() -> None:
    edge = [Seen("PET", 0.7), Seen("PET", 0.9), Seen("PET", 0.3)]
    server = [Seen("PET", 0.6, LEFT), Seen("PET", 0.95, RIGHT)]
    told = compare(edge, server, USUAL)
    pairs = [(match["edge"], match["server"], match["iou"]) for match in told["matches"]]
    assert pairs == [(0, 0, None), (1, 1, None)]
    assert (told["edge_only"], told["mean_iou"]) == ([2], None)


@pytest.mark.parametrize("name", ["pet_bottle", "PET bottle", "Pet-Bottle", " PET__bottle "])
def test_spelling_makes_no_other_class(name: str) -> None:
    assert _codes([Seen(name, 0.9, LEFT)], [Seen("PET_bottle", 0.9, LEFT)]) == []


def test_a_box_moves_with_its_image() -> None:
    assert scaled((10.0, 20.0, 30.0, 40.0), (100, 200), (50, 400)) == (5.0, 40.0, 15.0, 80.0)


_EDGE_PX = st.floats(0, 1000, allow_nan=False)


@st.composite
def _boxes(draw: st.DrawFn) -> Box:
    x1, x2 = sorted((draw(_EDGE_PX), draw(_EDGE_PX)))
    y1, y2 = sorted((draw(_EDGE_PX), draw(_EDGE_PX)))
    return x1, y1, x2, y2


_SEEN = st.builds(
    Seen, st.sampled_from(["PET", "HDPE", "can"]), st.floats(0, 1, allow_nan=False), st.none() | _boxes()
)
_BOXED = st.builds(Seen, st.sampled_from(["PET", "HDPE"]), st.floats(0, 1, allow_nan=False), _boxes())


@given(_boxes(), _boxes())
def test_iou_is_a_share_and_knows_no_order(one: Box, other: Box) -> None:
    assert 0 <= iou(one, other) <= 1
    assert iou(one, other) == iou(other, one)


@given(st.lists(_SEEN, max_size=8), st.lists(_BOXED, max_size=8))
def test_every_detection_is_told_exactly_once_and_the_verdict_has_reasons(
    edge: list[Seen], server: list[Seen]
) -> None:
    told = compare(edge, server, USUAL)
    assert sorted([*told["edge_only"], *(m["edge"] for m in told["matches"])]) == list(range(len(edge)))
    assert sorted([*told["server_only"], *(m["server"] for m in told["matches"])]) == list(range(len(server)))
    assert told["mismatch"] is bool(told["reasons"])
    for match in told["matches"]:
        assert match["iou"] is None or match["iou"] >= USUAL.iou - 1e-4


@given(st.lists(_BOXED, max_size=8), st.lists(_BOXED, max_size=8))
def test_the_verdict_does_not_hang_on_who_is_called_the_machine(one: list[Seen], other: list[Seen]) -> None:
    everything = Thresholds(iou=0.5, confidence_difference=0.3, confidence=0.0)
    assert compare(one, other, everything)["mismatch"] == compare(other, one, everything)["mismatch"]


@given(st.lists(_BOXED, max_size=8, unique_by=lambda seen: seen.box))
@example([Seen("PET", 0.0, (0.0, 0.0, 5e-324, 0.5))])  # its area is too small for a number
def test_the_same_answer_twice_agrees(seen: list[Seen]) -> None:
    visible = [one for one in seen if one.box and iou(one.box, one.box) > 0]
    told = compare(visible, visible, USUAL)
    assert told["mismatch"] is False
