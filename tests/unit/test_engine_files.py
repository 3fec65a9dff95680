from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rvmcv_worker.engine_files import EngineFiles


def _writes(size_bytes: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(b"x" * size_bytes) and None  # type: ignore[func-returns-value]


def _never(path: Path) -> None:
    raise AssertionError(f"{path} was placed twice")


@pytest.fixture
def files(tmp_path: Path) -> EngineFiles:
    return EngineFiles(tmp_path, 100)


def test_a_file_is_placed_once(files: EngineFiles, tmp_path: Path) -> None:
    assert files.take("models/a.pt", _writes(10)) == "in/models/a.pt"
    assert files.take("models/a.pt", _never) == "in/models/a.pt"
    assert (tmp_path / "models/a.pt").stat().st_size == 10


def test_a_file_that_came_in_part_is_not_there(files: EngineFiles, tmp_path: Path) -> None:
    def breaks(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        files.take("models/a.pt", breaks)
    assert not (tmp_path / "models/a.pt").exists()
    files.take("models/a.pt", _writes(10))


def test_over_the_limit_the_one_used_least_recently_goes(files: EngineFiles, tmp_path: Path) -> None:
    for name in ("a", "b"):
        files.take(name, _writes(40))
        files.give_back(name)
    files.take("a", _never)
    files.take("c", _writes(40))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


def test_what_a_request_needs_stays_until_it_is_over(files: EngineFiles, tmp_path: Path) -> None:
    files.take("a", _writes(80))
    files.take("a", _never)
    files.take("b", _writes(80))
    files.give_back("a")
    assert (tmp_path / "a").exists()
    files.give_back("a")
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()


def test_a_directory_counts_with_what_lies_in_it(files: EngineFiles, tmp_path: Path) -> None:
    def export(path: Path) -> None:
        path.mkdir()
        (path / "model.bin").write_bytes(b"x" * 5000)

    files.take("exports/k", export)
    files.give_back("exports/k")
    files.take("b", _writes(1))
    assert not (tmp_path / "exports/k").exists()


def test_what_nobody_needs_can_be_dropped(files: EngineFiles, tmp_path: Path) -> None:
    for name in ("a", "b"):
        files.take(name, _writes(10))
    files.give_back("b")
    files.drop_unused()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    files.take("b", _writes(10))
    files.take("a", _never)
