"""Entries kept in memory and in a mapped file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from rvmcv_worker.compute.entry_store import Entry, EntryStore, FileStore, MemoryStore
from tests.file_limit import file_limit

SIZE = 10_000


def _entry(number: int, size: int = SIZE) -> Entry:
    return np.random.default_rng(number).standard_normal(size).astype(np.float16)


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EntryStore]:
    opened = MemoryStore() if request.param == "memory" else FileStore(tmp_path / "entries.f16", SIZE)
    with contextlib.closing(opened):
        yield opened


def test_entries_come_back_in_any_order_also_between_two_of_them(store: EntryStore) -> None:
    for number in range(5):
        store.append(_entry(number))
    store.expect([4, 0, 2])
    for number in (4, 0, 2):
        assert np.array_equal(store.read(number), _entry(number))
    store.append(_entry(5))
    for number in (5, 1):
        assert np.array_equal(store.read(number), _entry(number))


def test_an_entry_is_a_copy_that_nobody_changes(store: EntryStore) -> None:
    entry = _entry(0)
    store.append(entry)
    entry[:] = 0
    read = store.read(0)
    assert np.array_equal(read, _entry(0))
    with pytest.raises(ValueError, match="read-only"):
        read[0] = 1


def test_the_file_goes_with_the_store(tmp_path: Path) -> None:
    path = tmp_path / "entries.f16"
    store = FileStore(path, SIZE)
    store.append(_entry(0))
    held = store.read(0)
    assert path.stat().st_size == 2 * SIZE
    store.close()
    store.close()
    assert not path.exists()
    assert np.array_equal(held, _entry(0))  # and what is still held can still be read


def test_what_is_forgotten_makes_room(store: EntryStore) -> None:
    for number in range(4):
        store.append(_entry(number))
    assert np.array_equal(store.read(3), _entry(3))
    store.truncate(2)
    store.append(_entry(9))
    for number, made_of in ((0, 0), (1, 1), (2, 9)):
        assert np.array_equal(store.read(number), _entry(made_of))


def test_what_an_earlier_training_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "entries.f16"
    path.write_bytes(b"x" * 100 * SIZE)
    with contextlib.closing(FileStore(path, SIZE)) as store:
        store.append(_entry(3))
        assert path.stat().st_size == 2 * SIZE
        assert np.array_equal(store.read(0), _entry(3))


def test_an_entry_without_room_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "entries.f16"
    with contextlib.closing(FileStore(path, SIZE)) as store:
        store.append(_entry(0))
        with file_limit(3 * SIZE), pytest.raises(OSError, match="File too large"):
            store.append(_entry(1))
        assert path.stat().st_size == 2 * SIZE
        store.append(_entry(2))
        assert np.array_equal(store.read(0), _entry(0))
        assert np.array_equal(store.read(1), _entry(2))


def test_what_is_read_of_a_file_is_not_the_jobs_memory(tmp_path: Path) -> None:
    size = 8 << 20
    with contextlib.closing(FileStore(tmp_path / "entries.f16", size)) as store:
        for number in range(4):
            store.append(np.full(size, number, np.float16))
        before = psutil.Process().memory_info()
        held = [store.read(number) for number in range(4)]
        assert [float(entry.max()) for entry in held] == [0, 1, 2, 3]
        after = psutil.Process().memory_info()
    mapped = 4 * 2 * size
    assert after.rss - before.rss > mapped // 2  # the pages are there
    assert after.rss - after.shared - (before.rss - before.shared) < mapped // 8  # but are the file's
