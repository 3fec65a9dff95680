"""The file for node_exporter: whole or not there, for everybody to read, gone with the worker."""

from __future__ import annotations

import queue
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from rvmcv_worker.metrics_file import MetricsFile

SOON_S = 0.01


class Texts:
    """Says what is written, and tells each time it was asked."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._count = 0

    def __call__(self) -> bytes:
        self._count += 1
        self.asked.put(self._count)
        return f"rvmcv_looks {self._count}\n".encode()

    def wait_for_more(self) -> None:
        """Return once what was asked for by now is written, and asked for anew."""
        while not self.asked.empty():
            self.asked.get()
        for _ in range(2):
            self.asked.get(timeout=10)


@pytest.fixture
def texts() -> Texts:
    return Texts()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "textfiles" / "rvmcv.prom"


@pytest.fixture
def writer(file: Path, texts: Texts) -> Iterator[MetricsFile]:
    made = MetricsFile(file, texts, SOON_S)
    yield made
    made.close()


def test_everybody_can_read_it_and_it_goes_with_the_worker(
    file: Path, texts: Texts, writer: MetricsFile
) -> None:
    file.parent.mkdir()
    writer.start()
    texts.wait_for_more()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert file.read_bytes().startswith(b"rvmcv_looks ")
    writer.close()
    assert list(file.parent.iterdir()) == []


def test_a_reader_finds_it_whole(file: Path, texts: Texts, writer: MetricsFile) -> None:
    file.parent.mkdir()
    writer.start()
    texts.wait_for_more()
    for _ in range(200):
        assert file.read_bytes().endswith(b"\n")
    assert [path.suffix for path in file.parent.iterdir() if path != file] in ([], [".part"])


def test_a_directory_that_cannot_be_written_is_told_once_and_tried_again(
    file: Path, texts: Texts, writer: MetricsFile, logged: list[str]
) -> None:
    writer.start()  # its directory is not there
    texts.wait_for_more()
    texts.wait_for_more()
    (said,) = logged
    assert said.startswith(f"WARNING [worker] metrics_file: {file} cannot be written: No such file")
    assert "ReadWritePaths" in said
    file.parent.mkdir()
    texts.wait_for_more()
    assert file.exists()
    assert logged[1:] == [f"INFO {file} is written again\n"]


def test_a_link_in_the_way_is_not_followed(
    file: Path, texts: Texts, writer: MetricsFile, tmp_path: Path
) -> None:
    file.parent.mkdir()
    other = tmp_path / "other"
    other.write_text("untouched")
    for name in (file.name, f".{file.name}.part"):
        (file.parent / name).symlink_to(other)
    writer.start()
    texts.wait_for_more()
    assert other.read_text() == "untouched"
    assert not file.is_symlink()


def test_a_fault_in_the_metrics_ends_nothing(file: Path, logged: list[str]) -> None:
    file.parent.mkdir()
    asked: queue.SimpleQueue[None] = queue.SimpleQueue()

    def broken() -> bytes:
        asked.put(None)
        raise RuntimeError("a bug")

    writer = MetricsFile(file, broken, SOON_S)
    writer.start()
    for _ in range(2):
        asked.get(timeout=10)
    assert writer.is_alive()
    writer.close()
    assert "a fault of the worker's own in its metrics" in logged[0]
