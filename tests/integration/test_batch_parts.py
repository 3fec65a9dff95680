"""The parts of a batch and what the next attempt goes on from, against real object storage."""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rvmcv_worker import batch_checkpoint, batch_parts
from rvmcv_worker.batch_checkpoint import BatchCheckpoint
from rvmcv_worker.batch_parts import BatchParts
from rvmcv_worker.config import (
    ServerSettings,
    Settings,
    StorageSettings,
    TimingSettings,
    WorkerSettings,
    load_credentials,
)
from rvmcv_worker.controller import Controller
from rvmcv_worker.errors import JobCancelledError, UploadFailedError, WorkerStoppedError
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.protocol import Checkpoint
from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.storage import Storage, Stored
from rvmcv_worker.token_source import TokenSource

BATCH = hashlib.sha256(b"a batch").hexdigest()
Put = Callable[[Path, str, Interrupt], Stored]


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    with closing(Interrupt()) as wish:
        yield wish


@pytest.fixture
def put(tmp_path: Path, shared_server: ReferenceServer, request: pytest.FixtureRequest) -> Iterator[Put]:
    """Put under the keys of an attempt of a job of the test's own."""
    server = shared_server
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    for name, secret in (
        ("token", server.worker_token),
        ("s3-access-key", server.s3_access_key),
        ("s3-secret-key", server.s3_secret_key),
    ):
        (credentials / name).write_text(secret)
    settings = Settings(
        server=ServerSettings(url=server.url),
        worker=WorkerSettings(credentials_dir=credentials, runtime_dir=tmp_path),
        storage=StorageSettings(s3_endpoint=server.s3_endpoint),
        timing=TimingSettings(scale=0.001),
    )
    controller = Controller(settings, TokenSource(settings), "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11")
    storage = Storage(settings, load_credentials(settings), controller)
    job_id = f"batch-{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"

    def put(path: Path, name: str, interrupt: Interrupt) -> Stored:
        return storage.put_artifact(
            path, name, job_id=job_id, attempt=1, lease_token="t", interrupt=interrupt
        )

    yield put
    storage.close()
    controller.close()


class Batch:
    """Parts of two lines, and what was told of them."""

    def __init__(self, directory: Path, put: Put, interrupt: Interrupt) -> None:
        self.directory, self.put, self.interrupt = directory, put, interrupt
        self.told: list[Checkpoint] = []

    def parts(self, left_off: BatchCheckpoint | None = None, part_size: int = 2) -> BatchParts:
        return BatchParts(
            self.directory,
            left_off or BatchCheckpoint(batch_sha256=BATCH),
            self.put,
            part_size=part_size,
            interrupt=self.interrupt,
            on_checkpoint=self.told.append,
        )


@pytest.fixture
def batch(tmp_path: Path, put: Put, interrupt: Interrupt) -> Batch:
    directory = tmp_path / "out"
    directory.mkdir()
    return Batch(directory, put, interrupt)


def _write(parts: BatchParts, indexes: range) -> None:
    for index in indexes:
        parts.summary.add_error("image_invalid")
        parts.add({"index": index, "id": f"ä\ud800{index}", "ok": False, "nan": float("nan")})


def _lines(server: ReferenceServer, path: str, sha256: str) -> list[dict[str, Any]]:
    content = server.read_object(path)
    assert hashlib.sha256(content).hexdigest() == sha256
    return [json.loads(line) for line in gzip.decompress(content).splitlines()]


def test_lines_go_to_storage_in_parts_and_leave_nothing_here(
    batch: Batch, shared_server: ReferenceServer
) -> None:
    with batch.parts() as parts:
        _write(parts, range(5))
        done = parts.finish()
    assert [part.images for part in done.parts] == [2, 2, 1]
    assert [part.path.rsplit("/", 2)[1:] for part in done.parts] == [
        ["attempt-1", f"part-0000{number}.jsonl.gz"] for number in range(3)
    ]
    lines = [line for part in done.parts for line in _lines(shared_server, part.path, part.sha256)]
    assert [line["index"] for line in lines] == list(range(5))
    assert lines[3] == {"index": 3, "id": "ä?3", "ok": False, "nan": None}
    assert [checkpoint.next_index for checkpoint in batch.told] == [2, 4, 5]
    assert list(batch.directory.iterdir()) == []


def test_equal_lines_make_equal_bytes(tmp_path: Path, batch: Batch) -> None:
    with batch.parts(part_size=1) as parts:
        _write(parts, range(1))
        first = parts.finish()
    with batch.parts(part_size=1) as parts:
        _write(parts, range(1))
        assert parts.finish().parts == first.parts


def test_the_next_attempt_goes_on_from_the_newest_checkpoint(
    tmp_path: Path, batch: Batch, shared_server: ReferenceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second passes at each look: writing so little takes less than the millisecond counted in.
    clock = SimpleNamespace(monotonic=functools.partial(next, itertools.count()))
    monkeypatch.setattr(batch_parts, "time", clock)
    with batch.parts() as parts:
        _write(parts, range(5))
        parts.finish()
    newest = batch.told[-2]
    content = shared_server.read_object(newest.path)
    assert hashlib.sha256(content).hexdigest() == newest.sha256
    file = tmp_path / "checkpoint"
    file.write_bytes(content)
    left_off = batch_checkpoint.read(file, BATCH, 7)
    assert (left_off.next_index, len(left_off.parts), left_off.summary.images_failed) == (4, 2, 4)
    with batch.parts(left_off) as parts:
        _write(parts, range(4, 7))
        done = parts.finish()
    assert [part.images for part in done.parts] == [2, 2, 2, 1]
    assert done.parts[:2] == left_off.parts
    assert done.summary.errors == {"image_invalid": 7}
    assert done.summary.spent_s > left_off.summary.spent_s > 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"[]",
        b'{"batch_sha256": "x"}',
        BatchCheckpoint(batch_sha256="0" * 64).model_dump_json().encode(),
        BatchCheckpoint(batch_sha256=BATCH, version=2).model_dump_json().encode(),
        BatchCheckpoint(batch_sha256=BATCH, next_index=5).model_dump_json().encode(),
    ],
    ids=["empty", "other bytes", "a list", "not whole", "another batch", "another version", "no parts"],
)
def test_a_checkpoint_of_something_else_starts_the_batch_over(
    tmp_path: Path, logged: list[str], content: bytes
) -> None:
    file = tmp_path / "checkpoint"
    file.write_bytes(content)
    assert batch_checkpoint.read(file, BATCH, 100) == BatchCheckpoint(batch_sha256=BATCH)
    assert any("the job starts" in line for line in logged)


class Gate:
    """Storage that takes nothing before it is opened, and then hears of the wish to end."""

    def __init__(self, put: Put) -> None:
        self._put = put
        self.entered, self.open = threading.Semaphore(0), threading.Event()

    def __call__(self, path: Path, name: str, interrupt: Interrupt) -> Stored:
        self.entered.release()
        while not self.open.wait(0.01):
            interrupt.check()
        return self._put(path, name, interrupt)


def test_slow_storage_holds_the_batch_up_instead_of_filling_the_disk(
    batch: Batch, put: Put, interrupt: Interrupt
) -> None:
    gate = batch.put = Gate(put)
    written = threading.Semaphore(0)

    def write() -> None:
        with batch.parts() as parts:
            for index in range(20):
                _write(parts, range(index, index + 1))
                written.release()
            parts.finish()

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(5):  # two parts wait, and one line of the third
        assert written.acquire(timeout=10)
    assert not written.acquire(timeout=0.3)
    assert len(list(batch.directory.iterdir())) == 3
    gate.open.set()
    writer.join(20)
    assert batch.told[-1].next_index == 20


def test_a_stop_stores_what_is_written_and_a_cancel_does_not(
    batch: Batch, put: Put, interrupt: Interrupt
) -> None:
    with batch.parts() as parts:
        _write(parts, range(3))
        interrupt.request(StopReason.WORKER_STOPPED)
        parts.save()
    assert [checkpoint.next_index for checkpoint in batch.told] == [2, 3]

    with closing(Interrupt()) as cancelled:
        batch.put, batch.interrupt = Gate(put), cancelled
        with batch.parts() as parts:
            _write(parts, range(2))
            cancelled.request(StopReason.CANCELLED)
            with pytest.raises(JobCancelledError):
                parts.finish()
    assert len(batch.told) == 2


def test_a_stop_is_heard_while_storage_holds_the_batch_up(
    batch: Batch, put: Put, interrupt: Interrupt
) -> None:
    gate = batch.put = Gate(put)
    with batch.parts() as parts:
        _write(parts, range(4))
        assert gate.entered.acquire(timeout=10)
        interrupt.request(StopReason.WORKER_STOPPED)
        with pytest.raises(WorkerStoppedError):
            _write(parts, range(4, 20))


def test_storage_that_stays_away_ends_the_batch(batch: Batch, interrupt: Interrupt) -> None:
    def away(path: Path, name: str, interrupt: Interrupt) -> Stored:
        raise UploadFailedError(f"{name} could not be stored")

    batch.put = away

    def whole() -> None:
        with batch.parts() as parts:
            _write(parts, range(2))
            parts.finish()

    with pytest.raises(UploadFailedError, match=r"part-00000\.jsonl\.gz"):
        whole()
    assert batch.told == []


def test_no_checkpoint_passes_over_a_part_that_was_not_stored(
    batch: Batch, put: Put, interrupt: Interrupt
) -> None:
    def second_is_lost(path: Path, name: str, interrupt: Interrupt) -> Stored:
        if name == "part-00001.jsonl.gz":
            raise UploadFailedError(f"{name} could not be stored")
        return put(path, name, interrupt)

    gate = batch.put = Gate(second_is_lost)
    with batch.parts() as parts:
        _write(parts, range(4))
        interrupt.request(StopReason.WORKER_STOPPED)
        _write(parts, range(4, 5))
        gate.open.set()
        parts.save()
    assert [checkpoint.next_index for checkpoint in batch.told] == [2]
