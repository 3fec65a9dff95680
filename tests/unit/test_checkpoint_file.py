from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from rvmcv_worker.compute import checkpoint_file
from rvmcv_worker.compute.checkpoint_file import CheckpointError, Run, State

LAST = frozenset({"last.pt"})


def _state(epochs: int) -> State:
    told = [{"epoch": number, "losses": {"box_loss": 0.5}} for number in range(1, epochs + 1)]
    return State().after(Run(attempt=1, epochs=epochs, batch_size=8), told, trained_s=1.5, ended_by=None)


def test_what_was_written_is_what_the_next_attempt_gets(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    checkpoint_file.write(tmp_path, _state(3), {"last.pt": tmp_path / "weights"})
    into = tmp_path / "into"
    into.mkdir()
    found = checkpoint_file.unpack(tmp_path / "checkpoint-3.tar", into, LAST)
    assert found == _state(3)
    assert (into / "last.pt").read_bytes() == b"weights"
    went_on = found.after(Run(attempt=2, epochs=4), [{"epoch": 4}], trained_s=1.0, ended_by="patience")
    assert (went_on.epochs, went_on.trained_s, went_on.ended_by) == (7, 2.5, "patience")
    assert went_on.attempts() == [{"attempt": 1, "epochs": 3, "batch_size": 8}, {"attempt": 2, "epochs": 4}]


def test_the_newest_two_are_kept_and_none_is_half_written(tmp_path: Path) -> None:
    for epochs in (9, 10, 11):
        checkpoint_file.write(tmp_path, _state(epochs), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10.tar", "checkpoint-11.tar"]
    checkpoint_file.discard(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_the_last_epochs_are_told_again_and_each_message_is_small(tmp_path: Path) -> None:
    again = list(_state(1000).history_again())
    assert [entry["epoch"] for entries in again for entry in entries] == list(range(901, 1001))
    assert max(map(len, again)) == 25


def _tar(path: Path, *entries: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for entry, content in entries:
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def _link(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return entry


def _says(**state: object) -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo("state.json"), json.dumps(
        {"epochs": 1, "runs": [], "history": [], **state}
    ).encode()


GOOD = _says()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "no state.json"),
        ([GOOD, (tarfile.TarInfo("../evil"), b"x")], "evil"),
        ([GOOD, (tarfile.TarInfo("/etc/evil"), b"x")], "evil"),
        ([GOOD, GOOD], "twice"),
        ([GOOD, (_link("last.pt"), b"")], "not a plain file"),
        ([(_link("state.json"), b"")], "not a plain file"),
        ([(tarfile.TarInfo("state.json"), b"[" * 100_000)], "cannot be read"),
        ([_says(epochs=-1)], "no training says"),
        ([_says(epochs="1")], "no training says"),
        ([_says(runs=[{"attempt": 1, "epochs": 1.5}])], "no training says"),
        ([_says(ended_by="rm -rf")], "no training says"),
        ([_says(trained_s=None)], "no training says"),
        ([_says(history=[1])], "no training says"),
        ([_says(history=[{}] * 101)], "no training says"),
        ([_says(runs=[3])], "cannot be read"),
        ([_says(other=1)], "cannot be read"),
        ([(tarfile.TarInfo("state.json"), b"{}")], "cannot be read"),
    ],
)
def test_anything_else_is_refused_and_nothing_lies_outside(
    tmp_path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], said: str
) -> None:
    into = tmp_path / "a" / "into"
    into.mkdir(parents=True)
    file = _tar(tmp_path / "checkpoint.tar", *entries)
    with pytest.raises(CheckpointError, match=said):
        checkpoint_file.unpack(file, into, LAST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "checkpoint.tar"]


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w" * 10_000)
    checkpoint_file.write(tmp_path, _state(1), {"last.pt": tmp_path / "weights"})
    file = tmp_path / "checkpoint-1.tar"
    file.write_bytes(file.read_bytes()[:5000])
    (tmp_path / "into").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint_file.unpack(file, tmp_path / "into", LAST)
