"""Rows 17 to 20: archives that reach beyond their folder, and jobs that take all; each works undefended.

What is refused, kind by kind, is in `tests/unit/test_archive.py`; that only the child dies of what it takes,
and that the next job runs, in `tests/acceptance/test_faults_limits.py`.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rvmcv_worker.compute.archive import extract
from rvmcv_worker.errors import DatasetInvalidError
from tests.compute_child import ComputeChild
from tests.dataset_fixtures import BOX, draw, limits

_BOMB_BYTES = 30_000_000

Entry = tuple[tarfile.TarInfo, bytes]


def _file(name: str, content: bytes = b"outside") -> Entry:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    return entry, content


def _special(name: str, kind: bytes, link: str = "") -> Entry:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    entry.devmajor, entry.devminor = 1, 5
    return entry, b""


#: What the archive does -> its entries, for a folder to unpack in and a marker outside of it.
ARCHIVES: dict[str, Callable[[Path], list[Entry]]] = {
    "climbs out by ..": lambda marker: [_file(f"images/../../{marker.name}")],
    "names an absolute path": lambda marker: [_file(str(marker))],
    "writes through a link": lambda marker: [
        _special("escape", tarfile.SYMTYPE, str(marker.parent)),
        _file(f"escape/{marker.name}"),
    ],
    "writes through a hard link": lambda marker: [
        _special("images/a.jpg", tarfile.LNKTYPE, str(marker)),
        _file("images/a.jpg"),
    ],
}


def _packed(path: Path, entries: list[Entry]) -> Path:
    good = [_file("labels/a.txt", BOX), _file("images/good.jpg", draw(1))]
    with tarfile.open(path, "w") as archive:
        for entry, content in [*good, *entries]:
            archive.addfile(entry, io.BytesIO(content))
    return path


def _unpack_carelessly(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as opened:
        for entry in opened:  # as `tar -P` does, and Python's own did until its filters came
            if entry.islnk() and Path(entry.linkname).is_absolute():
                (target / entry.name).parent.mkdir(parents=True, exist_ok=True)
                os.link(entry.linkname, target / entry.name)
            elif entry.isreg():
                path = Path(os.path.normpath(target / entry.name))
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    file.write(opened.extractfile(entry).read())  # type: ignore[union-attr]
            else:
                opened.extract(entry, target, filter="fully_trusted")


@pytest.mark.parametrize("what", ARCHIVES)
def test_row_19_an_archive_writes_nothing_outside(tmp_path: Path, what: str) -> None:
    marker = tmp_path / "marker.jpg"
    before = b"before" if "hard link" in what else None

    def reset() -> None:
        marker.unlink(missing_ok=True)
        if before:
            marker.write_bytes(before)

    reset()
    archive = _packed(tmp_path / "dataset.tar", ARCHIVES[what](marker))
    (tmp_path / "careless").mkdir()
    _unpack_carelessly(archive, tmp_path / "careless")
    assert marker.read_bytes() == b"outside"
    reset()
    with pytest.raises(DatasetInvalidError):
        extract(archive, tmp_path / "target", limits(), lambda _: None)
    assert (marker.read_bytes() if marker.exists() else None) == before


@pytest.mark.parametrize(
    ("kind", "is_kind"),
    [
        (tarfile.FIFOTYPE, stat.S_ISFIFO),
        pytest.param(
            tarfile.CHRTYPE,
            stat.S_ISCHR,
            marks=pytest.mark.skipif(os.getuid() != 0, reason="only root makes devices"),
        ),
    ],
)
def test_row_19_an_archive_makes_no_special_file(
    tmp_path: Path, kind: bytes, is_kind: Callable[[int], bool]
) -> None:
    archive = _packed(tmp_path / "dataset.tar", [_special("images/a.jpg", kind)])
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "careless", filter="fully_trusted")
    assert is_kind((tmp_path / "careless" / "images" / "a.jpg").lstat().st_mode)
    with pytest.raises(DatasetInvalidError):
        extract(archive, tmp_path / "target", limits(), lambda _: None)
    assert not [path for path in tmp_path.rglob("target/**/*") if is_kind(path.lstat().st_mode)]


@pytest.mark.parametrize("first", ["images/a.jpg", "images/A.jpg"])
def test_row_19_no_entry_takes_the_place_of_another(tmp_path: Path, first: str) -> None:
    """On a file system that ignores case, or by a plain repeat, the second is what is there in the end."""
    archive = _packed(tmp_path / "dataset.tar", [_file(first, draw(2)), _file("images/a.jpg", b"another")])
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "careless", filter="data")
    found = {path.name.lower(): path.read_bytes() for path in sorted(tmp_path.glob("careless/images/*"))}
    assert found["a.jpg"] == b"another"
    with pytest.raises(DatasetInvalidError):
        extract(archive, tmp_path / "target", limits(), lambda _: None)


def _bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.bmp", bytes(_BOMB_BYTES))
    return path


def _crowd(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(6000):
            archive.writestr(f"images/{number}.jpg", b"")
    return path


@pytest.mark.parametrize(("make", "taken"), [(_bomb, _BOMB_BYTES), (_crowd, 6000)])
def test_row_20_a_bomb_is_not_unpacked(tmp_path: Path, make: Callable[[Path], Path], taken: int) -> None:
    archive = make(tmp_path / "dataset.zip")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "careless")
    unpacked = [path for path in tmp_path.rglob("careless/images/*") if path.is_file()]
    assert taken in {len(unpacked), sum(path.stat().st_size for path in unpacked)}
    with pytest.raises(DatasetInvalidError):
        extract(archive, tmp_path / "target", limits(), lambda _: None)
    kept = [path for path in tmp_path.rglob("target/**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < _BOMB_BYTES
    assert len(kept) < 6000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "takes"),
    [
        ("eat_memory", {"at_most_bytes": 500_000_000}),
        ("fill_disk", {"at_most_bytes": 150_000_000}),
        ("fill_inodes", {"files": 3000}),
        ("sparse_file", {"at_most_bytes": 10**13}),
        ("flood_log", {"at_most_bytes": 4_000_000}),
    ],
)
def test_row_17_18_without_limits_a_job_takes_what_it_likes(
    tmp_path: Path, ending: str, takes: dict[str, int]
) -> None:
    """More of each than its limit in `tests/acceptance/test_faults_limits.py`, where the child dies of it."""
    child = ComputeChild(tmp_path, "train", {"task": "stub", "steps": 1, "then": ending, **takes})
    assert child.finish()["ok"]
    files = [path for path in child.directory.rglob("*") if path.is_file()]
    if ending == "fill_inodes":
        assert len(files) > takes["files"]
    elif ending == "flood_log":
        assert child.log_file.stat().st_size > takes["at_most_bytes"] * 0.8
    elif ending != "eat_memory":
        assert max(path.stat().st_size for path in files) > takes["at_most_bytes"] * 0.8
