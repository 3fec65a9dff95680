"""What `rvmcv-worker wipe` takes, keeps and leaves to a worker that runs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from rvmcv_worker import kept_claims, leftovers, state_lock
from rvmcv_worker.config import Settings
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.ledger import Ledger
from rvmcv_worker.process_tree import COOKIE
from tests.ordinary_user import UID

DAY_S = 86400.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    directories = {"state_dir": str(tmp_path / "state"), "runtime_dir": str(tmp_path / "run")}
    return Settings.model_validate({"worker": directories})


def _fill(settings: Settings, *, claim_id: str | None = None) -> str:
    """Leave what a daemon leaves that a power cut ends: returns the id of its claim."""
    claim_id = claim_id or str(uuid.uuid4())
    work, store, run = settings.work_dir, settings.model_store_dir, settings.worker.runtime_dir
    for name in ("train_1-2", "train_0-1", "_engine-approved", ".wipe-7-0"):
        (work / name / "deep/er").mkdir(parents=True)
        (work / name / "deep/er/file").write_text("a picture of somebody")
    store.mkdir()
    (store / ("a" * 64)).write_text("weights")
    (store / ".part-0011").write_text("half of other weights")
    run.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(run / "health.sock"))
    (run / "health.other").write_text("no socket")
    ledger = Ledger(settings.worker.state_dir / "ledger.sqlite3")
    ledger.begin_claim("train_1", "yolo11", claim_id)
    ledger.claimed("train_1", 2, "t" * 32)
    ledger.close()
    return claim_id


def _names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def test_what_no_claim_names_goes_and_what_one_names_is_kept(settings: Settings) -> None:
    _fill(settings)
    said = list(leftovers.wipe(settings, store=False))
    assert _names(settings.work_dir) == {"train_1-2"}
    assert (settings.work_dir / "train_1-2/deep/er/file").exists()
    assert _names(settings.model_store_dir) == {"a" * 64}
    assert _names(settings.worker.runtime_dir) == {"health.other"}
    assert "kept for the worker's next start: train_1-2" in said
    assert not state_lock.is_held(settings.worker.state_dir)


def test_the_store_goes_when_that_is_asked_for(settings: Settings) -> None:
    _fill(settings)
    (settings.model_store_dir / "exports/x").mkdir(parents=True)
    list(leftovers.wipe(settings, store=True))
    assert _names(settings.model_store_dir) == set()
    assert _names(settings.work_dir) == {"train_1-2"}


def test_a_socket_that_somebody_listens_on_stays_and_so_do_those_of_strangers(settings: Settings) -> None:
    _fill(settings)
    run = settings.worker.runtime_dir
    (run / "health.sock").unlink()
    with socket.socket(socket.AF_UNIX) as lives, socket.socket(socket.AF_UNIX) as other:
        lives.bind(str(run / "health.sock"))
        lives.listen()
        other.bind(str(run / "other.sock"))
        list(leftovers.wipe(settings, store=False))
    assert _names(run) == {"health.sock", "other.sock", "health.other"}


def test_where_nothing_is_nothing_is_made(settings: Settings) -> None:
    assert list(leftovers.wipe(settings, store=True)) == []
    assert not settings.worker.state_dir.exists()


def test_files_of_a_claim_go_after_a_week_and_the_claim_stays(settings: Settings) -> None:
    claim_id = _fill(settings)
    list(leftovers.wipe(settings, store=False))
    _up_for(settings, claim_id, leftovers.KEPT_S - DAY_S / 2)
    list(leftovers.wipe(settings, store=False))
    assert _names(settings.work_dir) == {"train_1-2"}
    _up_for(settings, claim_id, leftovers.KEPT_S)
    said = list(leftovers.wipe(settings, store=False))
    assert _names(settings.work_dir) == set()
    assert any("train_1: no worker has come for its checkpoint in 7 days" in line for line in said)
    ledger = Ledger(settings.worker.state_dir / "ledger.sqlite3")
    assert [row.claim_id for row in ledger.claims()] == [claim_id], "the next start hands it back"
    ledger.close()


def _up_for(settings: Settings, claim_id: str, seconds: float) -> None:
    """Have the last count say that the claim had been waiting for so long."""
    file = settings.worker.state_dir / kept_claims.FILE_NAME
    found = json.loads(file.read_text())
    found["kept_s"][claim_id] = seconds
    file.write_text(json.dumps(found))


def test_time_is_counted_by_how_long_the_machine_is_up(tmp_path: Path) -> None:
    assert kept_claims.count(tmp_path, ["one"]) == {"one": 0.0}
    file = tmp_path / kept_claims.FILE_NAME
    found = json.loads(file.read_text())
    # An hour ago in this boot; days of the wall clock do not matter.
    file.write_text(json.dumps({**found, "up_s": found["up_s"] - 3600}))
    os.utime(file, (0, 0))
    assert 3600 <= kept_claims.count(tmp_path, ["one", "two"])["one"] < 3700
    # In another boot: this one's time so far counts, and nothing of the time between.
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "boot_id": "another", "up_s": 10**9}))
    kept_s = kept_claims.count(tmp_path, ["one", "two"])
    assert 3600 + found["up_s"] <= kept_s["one"] < 3700 + found["up_s"] + 100
    assert kept_s["two"] < kept_s["one"]
    assert kept_claims.count(tmp_path, []) == {}
    assert _names(tmp_path) == set()


@pytest.mark.parametrize("text", ["", "[]", '{"boot_id": 1, "up_s": "x", "kept_s": {}}', '{"kept_s": {}}'])
def test_a_count_that_cannot_be_read_begins_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / kept_claims.FILE_NAME).write_text(text)
    assert kept_claims.count(tmp_path, ["one"]) == {"one": 0.0}


def test_what_runs_of_a_dead_daemon_is_ended(settings: Settings) -> None:
    _fill(settings)
    cookie = {COOKIE: f"{settings.work_dir}/train_0-1"}
    with subprocess.Popen(["sleep", "60"], env={**os.environ, **cookie}) as left:
        assert "ended 1 processes that a worker had left behind" in leftovers.wipe(settings, store=False)
        assert left.wait(10) < 0


def _wipe(tmp_path: Path, settings: Settings, *options: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "config.toml"
    worker = settings.worker
    file.write_text(f'[worker]\nstate_dir = "{worker.state_dir}"\nruntime_dir = "{worker.runtime_dir}"\n')
    command = [sys.executable, "-m", "rvmcv_worker.cli", "wipe", *options, "--config", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_worker_that_runs_is_left_alone(tmp_path: Path, settings: Settings) -> None:
    _fill(settings)
    before = _names(settings.work_dir)
    with contextlib.closing(_Held(settings)):
        idle = _wipe(tmp_path, settings, "--if-idle")
        assert (idle.returncode, "nothing to do" in idle.stdout) == (0, True)
        plain = _wipe(tmp_path, settings)
        assert (plain.returncode, "while it runs it wipes by itself" in plain.stderr) == (75, True)
        store = _wipe(tmp_path, settings, "--store")
        assert store.returncode == ExitCode.NOT_RUNNING, "nobody answers on its socket"
    assert _names(settings.work_dir) == before


class _Held:
    """Holds the state directory as a daemon does."""

    def __init__(self, settings: Settings) -> None:
        self._lock = state_lock.take(settings.worker.state_dir)

    def close(self) -> None:
        os.close(self._lock)


@pytest.mark.skipif(os.getuid() != 0, reason="only root has another user's rights to take")
def test_root_wipes_as_the_workers_user(tmp_path: Path, settings: Settings) -> None:
    """Else its lock and its ledger would be root's, and the daemon could not open them."""
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        directory.chmod(directory.stat().st_mode | 0o011)
    _fill(settings)
    (settings.worker.state_dir / "lock").unlink(missing_ok=True)
    for top in (settings.worker.state_dir, settings.worker.runtime_dir):
        for path in (top, *top.rglob("*")):
            os.chown(path, UID, UID, follow_symlinks=False)
    moved = tmp_path / "another disk"
    settings.worker.state_dir.rename(moved)
    settings.worker.state_dir.symlink_to(moved)  # as root moves it
    done = _wipe(tmp_path, settings)
    assert done.returncode == 0, done.stderr
    state = moved
    assert {path.stat().st_uid for path in (state, *state.rglob("*"))} == {UID}
    assert _names(settings.work_dir) == {"train_1-2"}


def test_a_ledger_that_is_set_aside_is_told_in_the_words_of_the_daemon(
    tmp_path: Path, settings: Settings
) -> None:
    settings.worker.state_dir.mkdir()
    (settings.worker.state_dir / "ledger.sqlite3").write_text("no ledger of anybody's")
    done = _wipe(tmp_path, settings)
    assert done.returncode == 0
    assert " ERROR   ledger.set_aside ledger " in done.stderr
