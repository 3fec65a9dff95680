"""Label files, judged line by line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rvmcv_worker.compute.faults import Effect
from rvmcv_worker.compute.labels import Label, parse_label

TRIANGLE = "0 0.1 0.1 0.5 0.1 0.3 0.6"


def parse(text: str | bytes, *, segment: bool = False, classes: int = 3) -> Label:
    return parse_label(text.encode() if isinstance(text, str) else text, classes, segment=segment)


def codes(label: Label) -> list[tuple[str, int | None]]:
    return [(fault.kind.code, fault.line) for fault in label.faults]


@pytest.mark.parametrize(
    "text",
    [
        "0 0.5 0.5 0.2 0.2",
        "2 0.5 0.5 1 1\r\n0 0.2 0.2 0.1 0.1\r\n",
        "\ufeff1.0 .5 .5 .2 .2\n\n   \n",
        "0\t0.5\t0.5\t1e-1\t0.2",
        "0 -0.005 0.5 0.2 0.2",
        "0 1.01 0.5 0.01 0.2",
    ],
)
def test_good_boxes_have_no_fault(text: str) -> None:
    label = parse(text)
    assert codes(label) in ([], [("outside_image", 1)])
    assert not label.bad
    assert label.rewritten is None
    assert label.classes


BAD_LINES = [
    ("3 0.5 0.5 0.2 0.2", "class_out_of_range"),
    ("-1 0.5 0.5 0.2 0.2", "class_out_of_range"),
    ("1.5 0.5 0.5 0.2 0.2", "class_not_integer"),
    ("bottle 0.5 0.5 0.2 0.2", "not_a_number"),
    ("0 0,5 0,5 0,2 0,2", "not_a_number"),
    ("0 nan 0.5 0.2 0.2", "not_finite"),
    ("nan 0.5 0.5 0.2 0.2", "not_finite"),
    ("0 inf 0.5 0.2 0.2", "not_finite"),
    ("0 0.5 0.5 1e999 0.2", "not_finite"),
    ("0 320 240 64 48", "out_of_bounds"),
    ("0 0.5 1.02 0.2 0.2", "out_of_bounds"),
    ("0 -0.02 0.5 0.2 0.2", "negative"),
    ("0 0.5 0.5 -0.001 0.2", "negative"),
    ("0 0.5 0.5 0.2", "column_count"),
    ("0 0.5 0.5 0.2 0.2 0.9", "column_count"),
    ("0", "column_count"),
]


@pytest.mark.parametrize(("line", "code"), BAD_LINES)
def test_a_bad_box_costs_the_image_and_names_its_line(line: str, code: str) -> None:
    label = parse(f"0 0.5 0.5 0.2 0.2\n\n{line}\n")
    assert codes(label) == [(code, 3)]
    assert label.bad
    assert not label.classes
    assert label.faults[0].kind.effect is Effect.IMAGE


def test_a_box_without_size_costs_its_line_only() -> None:
    label = parse("0 0.5 0.5 0 0.2\r\n1 0.5 0.5 0.25 0.2")
    assert codes(label) == [("zero_size_box", 1)]
    assert (label.bad, label.classes, label.rewritten) == (False, (1,), "1 0.5 0.5 0.25 0.2\n")


def test_an_image_of_which_no_line_is_left_does_not_become_background() -> None:
    label = parse("0 0.5 0.5 0 0.2\n")
    assert codes(label) == [("nothing_left", 1), ("zero_size_box", 1)]
    assert label.bad


def test_the_same_line_twice_is_told_and_counted_once() -> None:
    label = parse("0 0.5 0.5 0.2 0.2\n0 0.50 0.5 0.2 0.2\n")
    assert codes(label) == [("duplicate_line", 2)]
    assert (label.bad, label.classes, label.rewritten) == (False, (0,), None)


def test_a_box_over_the_edge_is_a_warning() -> None:
    assert codes(parse("0 0.9 0.5 0.4 0.2\n")) == [("outside_image", 1)]


def test_an_empty_file_is_background() -> None:
    for text in (b"", b"\n \n", b"\xef\xbb\xbf"):
        assert parse(text) == Label((), (), None)


def test_text_that_is_not_utf8_names_the_line() -> None:
    label = parse(b"0 0.5 0.5 0.2 0.2\n0 0.5\xff")
    assert codes(label) == [("label_not_utf8", 2)]
    assert parse("0 0.5 0.5 0.2 0.2".encode("utf-16")).bad


def test_a_label_file_of_megabytes_is_not_taken_for_background() -> None:
    assert codes(parse("0 0.5 0.5 0.2 0.2\n" * 300_000)) == [("label_too_large", None)]


def test_polygons() -> None:
    assert parse(f"{TRIANGLE}\n", segment=True) == Label((0,), (), None)
    assert codes(parse(f"{TRIANGLE}\n")) == [("polygon_in_detect", 1)]
    assert parse(f"{TRIANGLE}\n").classes == (0,)
    assert codes(parse("0 0.5 0.5 0.2 0.2\n", segment=True)) == [("box_in_segment", 1)]
    for segment in (True, False):
        mixed = parse(f"{TRIANGLE}\n0 0.5 0.5 0.2 0.2\n", segment=segment)
        assert mixed.bad
        assert ("mixed_box_polygon", 2) in codes(mixed)
    assert ("column_count", 2) in codes(parse(f"{TRIANGLE}\n{TRIANGLE} 0.5\n", segment=True))
    assert codes(parse("0 0.1 0.1 0.5 0.1 0.3 1.05", segment=True)) == [("outside_image", 1)]
    assert codes(parse("0 0.1 0.1 0.5 0.1 0.3 2.7", segment=True)) == [("out_of_bounds", 1)]


def test_polygons_that_cover_nothing_cost_their_line() -> None:
    sliver = "1 0.1 0.1 0.5 0.5 0.3 0.3"
    label = parse(f"{TRIANGLE}\n{sliver}\n2 0.5 0.5\n", segment=True)
    assert codes(label) == [("sliver_polygon", 2), ("polygon_points", 3)]
    assert (label.bad, label.classes, label.rewritten) == (False, (0,), f"{TRIANGLE}\n")
    # As a box for a detection it is as good as any.
    assert codes(parse(f"{TRIANGLE}\n{sliver}\n")) == [("polygon_in_detect", 1)]


def test_reasons_are_one_printable_line() -> None:
    label = parse("\x1b[31m 0.5 0.5 0.2 0.2\n")
    assert label.faults[0].reason == "a column is not a number (\\x1b[31m 0.5 0.5 0.2 0.2)"


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_judged(content: bytes, segment: bool) -> None:
    label = parse_label(content, 3, segment=segment)
    assert not (label.bad and label.classes)
    assert all(fault.reason.isprintable() for fault in label.faults)


NUMBERS = st.one_of(
    st.floats(width=32).map(str),
    st.floats(0, 1).map(str),
    st.sampled_from(["0", "1", "nan", "-0", "1_0", "x", "٣"]),
)


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=8).map(" ".join), max_size=5), st.booleans())
def test_what_is_rewritten_is_good_and_means_the_same(lines: list[str], segment: bool) -> None:
    label = parse_label("\n".join(lines).encode(), 2, segment=segment)
    if label.rewritten is not None:
        again = parse_label(label.rewritten.encode(), 2, segment=segment)
        assert again.classes == label.classes
        assert not any(fault.kind.effect is not Effect.WARNING for fault in again.faults)
