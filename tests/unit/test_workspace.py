"""A workspace: made, measured, read back from and wiped, whatever a child left in it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rvmcv_worker import framing, workspace
from rvmcv_worker.errors import DiskQuotaError, JobCrashedError
from rvmcv_worker.workspace import Workspace


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workspace]:
    with workspace.make(tmp_path / "work", "job", 1) as place:
        place.child_dir("train")
        yield place
    assert list((tmp_path / "work").iterdir()) == []


def test_made_for_the_daemon_alone_and_wiped(tmp_path: Path) -> None:
    with workspace.make(tmp_path / "work", "job_1", 2) as place:
        assert place.root == tmp_path / "work" / "job_1-2"
        for directory in (place.root, place.in_dir, place.out_dir, place.child_dir("train")):
            assert directory.stat().st_mode & 0o777 == 0o700
    assert not place.root.exists()


def test_wiped_when_the_job_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), workspace.make(tmp_path, "job", 1) as place:
        raise ZeroDivisionError
    assert not place.root.exists()


def test_what_an_earlier_daemon_left_is_wiped_first(tmp_path: Path) -> None:
    (tmp_path / "job-1" / "train").mkdir(parents=True)
    with workspace.make(tmp_path, "job", 1) as place:
        assert sorted(entry.name for entry in place.root.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("job_id", ["../x", "", ".", "a/b", "a\0b", "x" * 4096, "-x", "a\n"])
def test_a_job_id_that_is_no_name(tmp_path: Path, job_id: str) -> None:
    with pytest.raises(ValueError, match="not a job id"), workspace.make(tmp_path, job_id, 1):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["in", "out", "..", "a/b", ""])
def test_a_child_cannot_have_the_daemons_directories(place: Workspace, name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        place.child_dir(name)


def make_deep(root: Path) -> None:
    fd = os.open(root, os.O_RDONLY)
    for _ in range(1100):  # beyond both the longest path and Python's recursion
        os.mkdir("directory", dir_fd=fd)
        below = os.open("directory", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def make_closed(root: Path) -> None:
    for mode in (0o000, 0o500, 0o100):
        directory = root / f"closed-{mode}"
        (directory / "inner" / "deeper").mkdir(parents=True)
        (directory / "inner" / "file").write_text("x")
        (directory / "inner").chmod(mode)
        directory.chmod(mode)
    root.chmod(0o000)


def make_odd(root: Path) -> None:
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(root, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    (root / "link").symlink_to("/")
    (root / "dangling").symlink_to("nowhere")
    (root / os.fsdecode(b"\xff\n name")).mkdir()
    (root / ".wipe-0").mkdir()
    (root / f".wipe-{os.getpid()}-0").mkdir()
    (root / "directory").mkdir()


def make_links_out(root: Path) -> None:
    outside = root.parents[2] / "outside"
    (root / "link").symlink_to(outside)
    (root / "directory").mkdir()
    (root / "directory" / "link").symlink_to(outside, target_is_directory=True)
    os.link(outside / "kept", root / "hard")


@pytest.mark.parametrize("make", [make_deep, make_closed, make_odd, make_links_out])
def test_wiping_takes_all_and_nothing_outside(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    with workspace.make(tmp_path / "work", "job", 1) as place:
        make(place.child_dir("train"))
    assert list((tmp_path / "work").iterdir()) == []
    assert (tmp_path / "outside" / "kept").read_text() == "kept"


def test_sweeping_keeps_what_it_is_told(tmp_path: Path) -> None:
    for name in ("a-1", "b-1", "c-2"):
        (tmp_path / name / "in").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "b-1")
    assert workspace.sweep(tmp_path, {"b-1"}) == ["a-1", "c-2", "file", "link"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["b-1"]
    assert workspace.sweep(tmp_path / "nowhere", set()) == []


def test_reading_back_freezes_a_copy(place: Workspace) -> None:
    (place.root / "train" / "weights").mkdir()
    (place.root / "train" / "weights" / "best.pt").write_bytes(b"x" * 3_000_000)
    copy = place.read_back("train", "weights/best.pt", max_bytes=3_000_000)
    assert copy == place.out_dir / "best.pt"
    assert copy.stat().st_mode & 0o777 == 0o600
    (place.root / "train" / "weights" / "best.pt").write_bytes(b"later")
    assert copy.read_bytes() == b"x" * 3_000_000
    again = place.read_back("train", "weights/best.pt", max_bytes=10)
    assert again is not None
    assert again.read_bytes() == b"later"
    assert (
        place.read_back("train", "weights/best.pt", max_bytes=10, as_name="last.pt")
        == place.out_dir / "last.pt"
    )
    assert sorted(entry.name for entry in place.out_dir.iterdir()) == ["best.pt", "last.pt"]


@pytest.mark.parametrize("name", ["best.pt", "weights/best.pt"])
def test_what_is_absent_is_none(place: Workspace, name: str) -> None:
    assert place.read_back("train", name, max_bytes=10) is None
    assert place.read_back("never", name, max_bytes=10) is None
    assert place.read_result("train") is None


SWAPS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "link": (lambda file, secret: file.symlink_to(secret), "a link"),
    "dangling link": (lambda file, _: file.symlink_to("nowhere"), "a link"),
    "hard link": (lambda file, secret: os.link(secret, file), "a hard link"),
    "fifo": (lambda file, _: os.mkfifo(file), "not a regular file"),
    "directory": (lambda file, _: file.mkdir(), "not a regular file"),
    "too big": (lambda file, _: file.write_bytes(b"x" * (16 * 1024**2 + 1)), "at most"),
}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("name", ["best.pt", "result.json"])
def test_what_a_child_put_in_a_files_place_is_not_read(
    place: Workspace, tmp_path: Path, swap: str, name: str
) -> None:
    secret = tmp_path / "token"
    secret.write_text("a secret")
    make, said = SWAPS[swap]
    make(place.root / "train" / name, secret)

    def read() -> object:
        if name == "result.json":
            return place.read_result("train")
        return place.read_back("train", name, max_bytes=16 * 1024**2)

    with pytest.raises(JobCrashedError, match=f"train/{name} .*{said}"):
        read()
    assert list(place.out_dir.iterdir()) == []


def test_a_socket_is_not_read(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root / "train")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("best.pt")
    with pytest.raises(JobCrashedError, match=r"train/best\.pt is not a regular file"):
        place.read_back("train", "best.pt", max_bytes=10)


def test_a_link_on_the_way_is_not_followed(place: Workspace, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "best.pt").write_text("a secret")
    (place.root / "train" / "weights").symlink_to(tmp_path / "secrets")
    with pytest.raises(JobCrashedError, match="a link"):
        place.read_back("train", "weights/best.pt", max_bytes=100)
    (place.root / "other").symlink_to(tmp_path / "secrets")
    with pytest.raises(JobCrashedError, match="a link"):
        place.read_back("other", "best.pt", max_bytes=100)


@pytest.mark.parametrize("name", ["../in/x", "/etc/passwd", "a//b", ".", "", "a\0b"])
def test_a_path_that_leads_out_is_refused(place: Workspace, name: str) -> None:
    with pytest.raises(JobCrashedError, match="not a path"):
        place.read_back("train", name, max_bytes=100)


def test_the_job_file_replaces_what_an_earlier_child_left(place: Workspace, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("kept")
    train = place.root / "train"
    (train / "job.json").symlink_to(outside)
    (train / "result.json").write_text(json.dumps({"ok": True}))
    place.write_job("train", {"task": "stub", "rate": float("nan")})
    assert json.loads((train / "job.json").read_text()) == {"task": "stub", "rate": None}
    assert place.read_result("train") is None
    assert outside.read_text() == "kept"
    (train / "result.json").mkdir()
    with pytest.raises(JobCrashedError, match=r"train/result\.json is in the way"):
        place.write_job("train", {})


def test_a_result_is_bounded(place: Workspace) -> None:
    result = place.root / "train" / "result.json"
    result.write_bytes(b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}")
    with pytest.raises(JobCrashedError, match=f"nested deeper than {framing.MAX_DEPTH}"):
        place.read_result("train")
    result.write_bytes(b'{"ok": true}')
    assert place.read_result("train") == {"ok": True}


def test_measuring_counts_what_is_allocated_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_bytes(b"x" * 1_000_000)
    before = workspace.measure(tmp_path)
    os.link(tmp_path / "a" / "file", tmp_path / "a" / "b" / "again")
    (tmp_path / "link").symlink_to("/")
    with (tmp_path / "hole").open("wb") as hole:
        hole.truncate(10**12)
    after = workspace.measure(tmp_path)
    assert before.files == 3
    assert after.files == 6
    assert 1_000_000 <= before.bytes <= after.bytes < 1_100_000


def test_what_cannot_be_measured_is_over_quota(tmp_path: Path) -> None:
    with workspace.make(tmp_path, "job", 1) as place:
        make_deep(place.child_dir("train"))
        with pytest.raises(DiskQuotaError, match="cannot be measured"):
            workspace.measure(place.root)
