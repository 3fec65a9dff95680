"""A val split of our own, and the leaks between splits."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rvmcv_worker.compute.leaks import MAX_DISTANCE, Leak, find_leaks, near_groups
from rvmcv_worker.compute.val_split import choose_val

IMAGES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=40)


@given(IMAGES, st.integers(0, 5), st.floats(0.05, 0.5))
def test_a_split_leaves_something_to_both_sides(
    images: list[tuple[int, ...]], seed: int, fraction: float
) -> None:
    val = choose_val(images, range(len(images)), fraction, seed)
    assert val == choose_val(images, range(len(images)), fraction, seed)
    train = set(range(len(images))) - val
    if len(images) < 2:
        assert not val
        return
    assert val
    assert train
    assert val < set(range(len(images)))
    if sum(bool(image) for image in images) >= 2:
        assert any(images[index] for index in val)
        assert any(images[index] for index in train)


@given(st.lists(st.integers(0, 8), min_size=2, max_size=60), st.integers(0, 5))
def test_groups_stay_whole_where_there_are_enough(groups: list[int], seed: int) -> None:
    sizes = Counter(groups)
    if len(sizes) < 4 or max(sizes.values()) > len(groups) * 0.3:
        return
    val = choose_val([(0,)] * len(groups), groups, 0.3, seed)
    assert not {groups[index] for index in val} & {
        groups[index] for index in range(len(groups)) if index not in val
    }


def test_each_class_keeps_its_share() -> None:
    images = [(0,)] * 80 + [(1,)] * 10 + [(0, 2)] * 10 + [()] * 20
    val = choose_val(images, range(len(images)), 0.2, 0)
    found = Counter(images[index] for index in val)
    assert found == {(0,): 16, (1,): 2, (0, 2): 2, (): 4}


HASHES = st.one_of(st.none(), st.sampled_from([0b1, 0b11, 0b1111_0000, 0b1111_0001, 0b1_1111_1111, 1 << 63]))
PICTURES = st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c", b"d"]), HASHES), max_size=12)


def distance(one: int | None, other: int | None) -> int:
    return 64 if one is None or other is None else (one ^ other).bit_count()


@given(PICTURES, PICTURES)
def test_leaks_are_all_found_and_only_those(
    earlier: list[tuple[bytes, int | None]], later: list[tuple[bytes, int | None]]
) -> None:
    leaks = {leak.later: leak for leak in find_leaks(earlier, later, lambda: None)}
    for index, (sha, dhash) in enumerate(later):
        nearest = min((distance(dhash, other) for _, other in earlier), default=64)
        if any(sha == other for other, _ in earlier):
            assert leaks[index].distance is None
            assert earlier[leaks[index].earlier][0] == sha
        elif nearest <= MAX_DISTANCE:
            assert leaks[index].distance == nearest
            assert distance(dhash, earlier[leaks[index].earlier][1]) == nearest
        else:
            assert index not in leaks


def test_a_leak_is_told_once_for_each_later_image() -> None:
    assert find_leaks([(b"x", 1), (b"y", 1)], [(b"z", 3), (b"y", 1)], lambda: None) == [
        Leak(0, 0, 1),
        Leak(1, 1, None),
    ]


def test_groups_follow_chains_of_near_images() -> None:
    far = [(bytes([index]), (index * 0x0F1E2D3C4B5A6978) & (2**64 - 1)) for index in range(3, 13)]
    images = [(b"a", 0b0), (b"b", 0b1111), (b"c", 0b1111_1111), (b"a", None), *far]
    groups = near_groups(images, lambda: None)
    assert groups[:4] == [0, 0, 0, 0]
    assert len(set(groups)) == 1 + len(far)


def test_when_all_look_alike_only_equal_files_are_grouped() -> None:
    images = [(b"a", 1), (b"b", 1), (b"c", 1), (b"b", 1)]
    assert near_groups(images, lambda: None) == [0, 1, 2, 1]
