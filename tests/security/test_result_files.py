"""Rows 37 and 38: what a child leaves in place of its results, read as anybody would, and as the daemon does.

What the daemon makes of each in a whole job is in `tests/acceptance/test_faults_processes.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rvmcv_worker import framing, workspace
from rvmcv_worker.child_log import ChildLog
from rvmcv_worker.errors import JobCrashedError
from rvmcv_worker.workspace import Workspace

SECRET = "canary-of-the-token"
_MAX_BYTES = 1_000_000
#: A careless reader of a FIFO would wait for ever; this long is enough to tell.
_HANG_S = 0.5
_RACES = 400


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workspace]:
    (tmp_path / "token").write_text(SECRET)
    with workspace.make(tmp_path / "work", "job", 1) as made:
        made.child_dir("train")
        yield made


def _token(place: Workspace) -> Path:
    return place.root.parents[1] / "token"


def _link(place: Workspace, path: Path) -> None:
    path.symlink_to(_token(place))


def _relative_link(place: Workspace, path: Path) -> None:
    path.symlink_to(os.path.relpath(_token(place), path.parent))


def _hard_link(place: Workspace, path: Path) -> None:
    os.link(_token(place), path)


def _link_to_a_link(place: Workspace, path: Path) -> None:
    path.with_name("between").symlink_to(_token(place))
    path.symlink_to("between")


def _fifo(_: Workspace, path: Path) -> None:
    os.mkfifo(path)


def _device(_: Workspace, path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root makes devices")
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero: without an end


def _link_to_a_device(_: Workspace, path: Path) -> None:
    path.symlink_to("/dev/zero")


def _sparse(_: Workspace, path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 * 1024**4)


def _directory(_: Workspace, path: Path) -> None:
    path.mkdir()


def _socket(_: Workspace, path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


#: What lies where a result belongs -> what a careless reader makes of it.
TRICKS: dict[str, tuple[Callable[[Workspace, Path], None], str]] = {
    "a link to the token": (_link, "reads the token"),
    "a relative link to the token": (_relative_link, "reads the token"),
    "a link to a link to the token": (_link_to_a_link, "reads the token"),
    "a hard link to the token": (_hard_link, "reads the token"),
    "a FIFO": (_fifo, "hangs"),
    "a device": (_device, "never ends"),
    "a link to a device": (_link_to_a_device, "never ends"),
    "a file of 10 TB": (_sparse, "never ends"),
    "a directory": (_directory, "raises"),
    "a socket": (_socket, "raises"),
}


def _read_carelessly(path: Path) -> str:
    """Read a file in a process of its own and say what came of it."""
    program = f"import sys; sys.stdout.write(open(sys.argv[1]).read({10 * _MAX_BYTES}))"
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program, str(path)],
            capture_output=True,
            text=True,
            timeout=10 if stat.S_ISREG(path.stat().st_mode) else None if path.is_char_device() else _HANG_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if run.returncode:
        return "raises"
    if SECRET in run.stdout:
        return "reads the token"
    return "never ends" if len(run.stdout) == 10 * _MAX_BYTES else "reads a file"


def _frozen(place: Workspace) -> Callable[[str], Path | None]:
    return lambda child: place.read_back(child, "best.pt", max_bytes=_MAX_BYTES)


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("name", ["result.json", "best.pt"])
def test_row_37_nothing_but_a_file_of_its_own_is_read(place: Workspace, trick: str, name: str) -> None:
    make, carelessly = TRICKS[trick]
    path = place.root / "train" / name
    make(place, path)
    if name == "best.pt":
        assert _read_carelessly(path) == carelessly
    read = place.read_result if name == "result.json" else _frozen(place)
    with pytest.raises(JobCrashedError) as caught:
        read("train")
    assert SECRET not in caught.value.message
    assert list(place.out_dir.iterdir()) == []


def test_row_37_nothing_is_read_through_a_directory_that_is_a_link(place: Workspace) -> None:
    (place.root / "train" / "weights").symlink_to(_token(place).parent)
    assert (place.root / "train" / "weights" / "token").read_text() == SECRET
    with pytest.raises(JobCrashedError):
        place.read_back("train", "weights/token", max_bytes=_MAX_BYTES)


def test_row_37_nothing_is_read_through_a_child_directory_that_is_a_link(place: Workspace) -> None:
    (place.root / "train").rmdir()
    (place.root / "train").symlink_to(_token(place).parent)
    assert (place.root / "train" / "token").read_text() == SECRET
    with pytest.raises(JobCrashedError):
        place.read_back("train", "token", max_bytes=_MAX_BYTES)
    assert place.read_result("other") is None


def test_row_37_wiping_a_workspace_removes_links_and_not_what_they_lead_to(place: Workspace) -> None:
    kept = _token(place).parent / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    (place.root / "train" / "kept").symlink_to(kept)
    workspace.wipe(place.root / "train")
    assert (kept / "file").read_text() == "kept"


@pytest.fixture
def swapped(place: Workspace) -> Iterator[Path]:
    """A file that somebody swaps for a link to the token and back, over and over."""
    train = place.root / "train"
    good, link, path = train / "good", train / "link", train / "best.pt"
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            good.write_text("a model")
            good.replace(path)
            link.symlink_to(_token(place))
            link.replace(path)

    swapping = threading.Thread(target=swap)
    swapping.start()
    yield path
    over.set()
    swapping.join()


def _looked_at_and_copied(path: Path, copy: Path) -> str:
    try:
        return shutil.copyfile(path, copy).read_text() if stat.S_ISREG(path.lstat().st_mode) else ""
    except FileNotFoundError:
        return ""


def test_row_37_a_file_swapped_while_it_is_read_is_its_own_or_none(place: Workspace, swapped: Path) -> None:
    """The tree is dead when the daemon reads; that it does not rest on this is what is shown."""
    assert any(_looked_at_and_copied(swapped, place.root / "copy") == SECRET for _ in range(1_000_000))
    read = []
    for _ in range(_RACES):
        try:
            copy = place.read_back("train", "best.pt", max_bytes=_MAX_BYTES)
        except JobCrashedError:
            continue
        if copy:
            read.append(copy.read_text())
    assert set(read) <= {"a model"}


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def test_row_38_json_100_000_deep_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RecursionError):
        json.loads(DEEP)
    with pytest.raises(framing.FramingError, match="nested deeper than 32"):
        framing.parse_object(DEEP)


def test_row_38_a_line_without_an_end_is_held_in_pieces(tmp_path: Path) -> None:
    chunk, chunks = b"x" * 65536, 1024  # 64 MB, and no newline
    held = 0
    with contextlib.closing(ChildLog(tmp_path / "log", _MAX_BYTES)) as log:
        for _ in range(chunks):
            log.feed(chunk)
            held = max(held, len(log._part) + len(log._flood))
    assert held <= 2 * len(chunk)
    assert (tmp_path / "log").stat().st_size < 2 * _MAX_BYTES


def test_row_38_a_million_lines_are_cut(tmp_path: Path) -> None:
    with contextlib.closing(ChildLog(tmp_path / "log", _MAX_BYTES)) as log:
        for _ in range(100):
            log.feed(b"line\n" * 10_000)
    assert log.tail.count("\n") < 200
    assert (tmp_path / "log").stat().st_size < 2 * _MAX_BYTES
