from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rvmcv_worker.token_handover import HandoverError, hand_over
from tests.ordinary_user import UID


@pytest.fixture
def told() -> Iterator[list[int]]:
    """The signals that this process, which stands for the daemon, got."""
    signals: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda signum, _frame: signals.append(signum))
    yield signals
    signal.signal(signal.SIGHUP, before)


def _source(directory: Path, text: str = "new-token\n") -> Path:
    file = directory / "token"
    file.write_text(text)
    file.chmod(0o600)
    return file


def _runtime(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


def test_a_new_token_takes_the_place_of_the_old_one_and_then_the_daemon_is_told(
    tmp_path: Path, told: list[int]
) -> None:
    runtime = _runtime(tmp_path)
    for token in ("first", "second"):
        hand_over(_source(tmp_path, token), runtime, os.getpid())
    assert (runtime / "credentials/token").read_text() == "second\n"
    assert (runtime / "credentials/token").stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in (runtime / "credentials").iterdir()] == ["token"]
    assert told == [signal.SIGHUP] * 2


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no such file: write the new token"), ("\n", "empty"), ("two words", "a space")]
)
def test_what_is_no_token_is_not_handed_over_and_nobody_is_told(
    tmp_path: Path, told: list[int], text: str | None, said: str
) -> None:
    runtime = _runtime(tmp_path)
    source = tmp_path / "token" if text is None else _source(tmp_path, text)
    with pytest.raises(HandoverError, match=said):
        hand_over(source, runtime, os.getpid())
    assert told == []
    assert list(runtime.iterdir()) == []


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path: Path, told: list[int]) -> None:
    runtime, elsewhere = _runtime(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (runtime / "credentials").symlink_to(elsewhere)
    with pytest.raises(HandoverError, match="cannot be written"):
        hand_over(_source(tmp_path), runtime, os.getpid())
    assert (list(elsewhere.iterdir()), told) == ([], [])


_AS_ROOT = """
import os, sys
from collections.abc import Iterator
from pathlib import Path
from rvmcv_worker.token_handover import hand_over, HandoverError
try:
    hand_over(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
except HandoverError as error:
    print(error)
print(os.getresuid(), os.getresgid(), os.getgroups())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives anything away")
def test_root_writes_and_signals_as_the_user_whose_directory_it_is(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        directory.chmod(directory.stat().st_mode | 0o011)  # on the way to what is the user's own
    runtime = _runtime(tmp_path)
    os.chown(runtime, UID, UID)
    source = _source(tmp_path)
    sleeping = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "sleep", "60"]
    with subprocess.Popen(sleeping) as daemon:
        command = [sys.executable, "-c", _AS_ROOT, str(source), str(runtime)]
        said = subprocess.run([*command, str(os.getpid())], capture_output=True, text=True, check=True).stdout
        assert "cannot be told: Operation not permitted" in said, "another's process is not signalled"
        said = subprocess.run([*command, str(daemon.pid)], capture_output=True, text=True, check=True).stdout
        assert said == f"{(UID,) * 3} {(UID,) * 3} []\n"
        assert daemon.wait(10) == -signal.SIGHUP
    assert (runtime / "credentials/token").stat().st_uid == UID
