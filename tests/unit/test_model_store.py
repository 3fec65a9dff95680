"""The store of weights: what it keeps, what it gives out, what it throws away."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rvmcv_worker.config import ServerSettings, Settings, TimingSettings, WorkerSettings, load_credentials
from rvmcv_worker.controller import Controller
from rvmcv_worker.errors import (
    ChecksumMismatchError,
    InvalidJobError,
    ModelInvalidError,
    ModelUnavailableError,
)
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.model_store import EXPORTS, ModelStore
from rvmcv_worker.storage import Storage
from rvmcv_worker.token_source import TokenSource
from tests.file_server import FileServer, give, sha256_of, status

DATA = b"weights" * 1000
OTHER = b"others" * 1000
API = "/api/v1/cv/download-model"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "state" / "models", 100_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "n.pt"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def fetch(store: ModelStore, server: FileServer, tmp_path: Path) -> Iterator[Callable[..., str]]:
    (tmp_path / "token").write_text("a-token")
    settings = Settings(
        server=ServerSettings(url=server.url),
        worker=WorkerSettings(credentials_dir=tmp_path, runtime_dir=tmp_path / "run"),
        timing=TimingSettings(scale=0.001),
    )
    controller = Controller(settings, TokenSource(settings), "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11")
    storage = Storage(settings, load_credentials(settings), controller)
    interrupt = Interrupt()

    def fetch(wanted: str, sha256: str | None = None, max_bytes: int = 1_000_000) -> str:
        return store.fetch_base_model(
            wanted, expected_sha256=sha256, storage=storage, max_bytes=max_bytes, interrupt=interrupt
        )

    yield fetch
    storage.close()
    controller.close()
    interrupt.close()


def _names(store_dir: Path) -> set[str]:
    return {path.name for path in store_dir.iterdir()}


def test_what_is_added_is_kept_under_its_hash_and_read_only(store: ModelStore, file: Path) -> None:
    sha256 = store.add(file)
    assert sha256 == hashlib.sha256(DATA).hexdigest()
    path = store.get(sha256)
    assert path is not None
    assert path.read_bytes() == DATA
    assert path.name == sha256
    assert path.stat().st_mode & 0o777 == 0o400
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert store.add(file) == sha256
    assert _names(path.parent) == {sha256}


def test_a_corrupted_file_is_removed_and_said(store: ModelStore, file: Path, logged: list[str]) -> None:
    sha256 = store.add(file)
    path = store.get(sha256)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(OTHER[:-1] + b"x")
    os.utime(path, (1, 1))
    assert store.get(sha256) is None
    assert not path.exists()
    assert any(f"{path} had the bytes of" in line for line in logged)


def test_what_is_placed_is_a_private_copy(store: ModelStore, file: Path, tmp_path: Path) -> None:
    sha256 = store.add(file)
    store.place(sha256, tmp_path / "base.pt")
    placed = (tmp_path / "base.pt").stat()
    assert (tmp_path / "base.pt").read_bytes() == DATA
    assert (placed.st_mode & 0o777, placed.st_nlink) == (0o600, 1)
    with pytest.raises(FileExistsError):
        store.place(sha256, tmp_path / "base.pt")


def test_corruption_between_look_and_copy_is_seen(store: ModelStore, file: Path, tmp_path: Path) -> None:
    sha256 = store.add(file)
    path = store.get(sha256)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(OTHER)
    with pytest.raises(ChecksumMismatchError, match="had become"):
        store.place(sha256, tmp_path / "base.pt")
    assert not (tmp_path / "base.pt").exists()
    with pytest.raises(ModelUnavailableError, match="no longer in the worker's store"):
        store.place(sha256, tmp_path / "base.pt")


@pytest.mark.parametrize("name", ["../x", "A" * 64, "abc", ""])
def test_only_a_hash_names_a_file(store: ModelStore, name: str) -> None:
    with pytest.raises(ValueError, match="not a sha256"):
        store.get(name)


def test_trim_goes_by_last_use(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models", 3000)
    kept = []
    for number in range(5):
        (tmp_path / "x").write_bytes(bytes([number]) * 1000)
        kept.append(store.add(tmp_path / "x"))
        os.utime(tmp_path / "models" / kept[-1], (number, number))
    assert store.get(kept[0]) is not None  # used just now
    assert store.trim(keep={kept[1]}) == [kept[2], kept[3]]
    assert store.trim() == []
    assert _names(tmp_path / "models") == {kept[0], kept[1], kept[4]}


def test_trim_leaves_the_last_used_one_even_over_the_limit(tmp_path: Path, file: Path) -> None:
    store = ModelStore(tmp_path / "models", 10)
    sha256 = store.add(file)
    assert store.trim() == []
    assert store.get(sha256) is not None


def test_trim_removes_what_a_killed_daemon_left(store: ModelStore, tmp_path: Path) -> None:
    directory = tmp_path / "state" / "models"
    for name, age_s in ((".part-old", 2 * 86400), (".part-new", 0)):
        (directory / name).write_bytes(b"x")
        os.utime(directory / name, (time.time() - age_s,) * 2)
    store.trim()
    assert _names(directory) == {".part-new"}


def test_an_emptied_store_keeps_what_was_used_lately(store: ModelStore, tmp_path: Path) -> None:
    directory = tmp_path / "state" / "models"
    kept = []
    for number, age_s in enumerate((7200, 600, 0)):
        (tmp_path / "x").write_bytes(bytes([number]))
        kept.append(store.add(tmp_path / "x", name=f"{number}.pt"))
        os.utime(directory / kept[-1], (time.time() - age_s,) * 2)
        (directory / EXPORTS / f"{kept[-1]}-cpu").mkdir(parents=True)
    assert store.empty(spared_s=1200) == 1
    assert _names(directory) == {*kept[1:], EXPORTS, "names.json"}
    assert _names(directory / EXPORTS) == {f"{sha256}-cpu" for sha256 in kept[1:]}
    assert store.empty(spared_s=0) == 2
    assert _names(directory) == {EXPORTS}
    assert store.used_bytes() == 0


def test_a_model_is_fetched_once(fetch: Callable[..., str], server: FileServer, store: ModelStore) -> None:
    sha256 = sha256_of(DATA)
    server.on(f"{API}/{sha256}", give(DATA))
    for _ in range(2):
        assert fetch(sha256) == sha256
    assert len(server.seen) == 1
    assert store.get(sha256) is not None


def test_a_name_is_looked_up_each_time_but_its_bytes_come_once(
    fetch: Callable[..., str], server: FileServer, tmp_path: Path
) -> None:
    server.on(f"{API}/yolo11n.pt", give(DATA, promise=sha256_of(DATA)))
    assert fetch("yolo11n.pt") == sha256_of(DATA)
    server.on(f"{API}/yolo11n.pt", give(DATA, promise=sha256_of(DATA)), status(404))
    assert fetch("yolo11n.pt") == sha256_of(DATA)
    server.on(f"{API}/yolo11n.pt", give(OTHER, promise=sha256_of(OTHER)))
    assert fetch("yolo11n.pt") == sha256_of(OTHER)
    assert _names(tmp_path / "state" / "models") == {sha256_of(DATA), sha256_of(OTHER)}


def test_a_name_with_a_hash_is_that_hash_or_an_error(
    fetch: Callable[..., str], server: FileServer, tmp_path: Path
) -> None:
    server.on(f"{API}/yolo11n.pt", give(OTHER, promise=sha256_of(DATA)))
    with pytest.raises(ChecksumMismatchError, match=f"not {sha256_of(DATA)}"):
        fetch("yolo11n.pt", sha256_of(DATA))
    assert _names(tmp_path / "state" / "models") == set()
    server.on(f"{API}/yolo11n.pt", give(DATA))
    assert fetch("yolo11n.pt", sha256_of(DATA).upper()) == sha256_of(DATA)


def test_two_hashes_contradict_each_other(fetch: Callable[..., str], server: FileServer) -> None:
    with pytest.raises(InvalidJobError, match="leave one of the two out"):
        fetch(sha256_of(DATA), sha256_of(OTHER))
    assert server.seen == []


def test_what_is_nowhere_says_what_to_do(
    fetch: Callable[..., str], server: FileServer, tmp_path: Path
) -> None:
    with pytest.raises(ModelUnavailableError, match="upload the model to RVM-Server"):
        fetch("yolo11n.pt")
    server.on(f"{API}/big", give(DATA))
    with pytest.raises(ModelInvalidError, match="at most 100"):
        fetch("big", max_bytes=100)
    assert _names(tmp_path / "state" / "models") == set()


def test_a_name_that_was_added_here_counts_where_the_server_has_none(
    fetch: Callable[..., str], server: FileServer, store: ModelStore, file: Path, logged: list[str]
) -> None:
    sha256 = store.add(file, name="yolo11n.pt")
    assert fetch("yolo11n.pt") == sha256
    assert any("taken from the store" in line for line in logged)
    with pytest.raises(ModelUnavailableError):
        fetch("yolo11n.pt", sha256_of(OTHER))
    server.on(f"{API}/yolo11n.pt", give(OTHER, promise=sha256_of(OTHER)))
    assert fetch("yolo11n.pt") == sha256_of(OTHER)


def test_broken_names_are_forgotten(fetch: Callable[..., str], tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / "state" / "models" / "names.json").write_text("{")
    with pytest.raises(ModelUnavailableError):
        fetch("yolo11n.pt")
    assert any("names are forgotten" in line for line in logged)
