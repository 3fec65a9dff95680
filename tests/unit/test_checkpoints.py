"""What a child may have put where its newest checkpoint belongs, and what the daemon makes of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rvmcv_worker import checkpoints, workspace
from rvmcv_worker.errors import FencedError, WorkerStoppedError
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.storage import Stored
from rvmcv_worker.workspace import Workspace

MAX_BYTES = 1000


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workspace]:
    with workspace.make(tmp_path / "work", "job", 2) as made:
        yield made


class Objects:
    """Where checkpoints are put: name -> bytes."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def put(self, path: Path, name: str, interrupt: Interrupt) -> Stored:
        interrupt.check()
        self.content[name] = path.read_bytes()
        sha256 = hashlib.sha256(self.content[name]).hexdigest()
        return Stored(f"s3://models/{name}", path.stat().st_size, sha256)


def _child_file(place: Workspace, name: str) -> Path:
    return place.child_dir("train") / name


def test_the_newest_is_stored_under_the_name_of_the_last(place: Workspace) -> None:
    for epoch in (9, 10):
        _child_file(place, f"checkpoint-{epoch}.tar").write_bytes(b"epoch %d" % epoch)
    for other in ("checkpoint-11.tar.part", "checkpoint-x.tar", "checkpoint-0000000000000012.tar"):
        _child_file(place, other).write_bytes(b"not one")
    objects = Objects()
    found = checkpoints.store_newest(place, objects.put, MAX_BYTES)
    assert found is not None
    assert (found.epoch, found.path) == (10, "s3://models/checkpoint-last.tar")
    assert objects.content == {"checkpoint-last.tar": b"epoch 10"}
    assert found.sha256 == hashlib.sha256(b"epoch 10").hexdigest()
    assert list(place.out_dir.iterdir()) == []
    assert checkpoints.newest_file(place) == "train/checkpoint-10.tar"


def test_without_one_there_is_none(tmp_path: Path, place: Workspace) -> None:
    assert checkpoints.store_newest(place, Objects().put, MAX_BYTES) is None
    gone = Workspace(tmp_path / "gone", "job", 1)
    assert checkpoints.store_newest(gone, Objects().put, MAX_BYTES) is None


@pytest.mark.parametrize("what", ["link", "hard link", "fifo", "directory", "too large"])
def test_what_is_no_file_of_the_childs_own_is_not_read(
    place: Workspace, tmp_path: Path, logged: list[str], what: str
) -> None:
    secret = tmp_path / "token"
    secret.write_text("canary")
    path = _child_file(place, "checkpoint-3.tar")
    if what == "link":
        path.symlink_to(secret)
    elif what == "hard link":
        os.link(secret, path)
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.write_bytes(bytes(MAX_BYTES + 1))
    objects = Objects()
    assert checkpoints.store_newest(place, objects.put, MAX_BYTES) is None
    assert objects.content == {}
    assert any("the newest checkpoint is not stored: train/checkpoint-3.tar" in line for line in logged)


def test_storage_that_does_not_answer_is_given_up(
    place: Workspace, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_LAST_S", 0.05)
    _child_file(place, "checkpoint-1.tar").write_bytes(b"x")

    def put(_path: Path, _name: str, interrupt: Interrupt) -> Stored:
        interrupt.wait(30)
        interrupt.check()
        raise AssertionError("not asked to end")

    with pytest.raises(checkpoints.StorageAwayError, match=r"not stored within 0\.05 s"):
        checkpoints.store_newest(place, put, MAX_BYTES)
    assert any("it takes longer than" in line for line in logged)


def test_a_stop_leaves_time_for_a_checkpoint_and_a_lost_lease_does_not() -> None:
    interrupt = Interrupt()
    before = interrupt.branch()
    interrupt.request(StopReason.WORKER_STOPPED, "stopped")
    with pytest.raises(WorkerStoppedError):
        interrupt.check()
    before.check()
    interrupt.request(StopReason.FENCED, "taken")
    for branch in (before, interrupt.branch()):
        with pytest.raises(FencedError, match="taken"):
            branch.check()
        branch.close()
    interrupt.close()
