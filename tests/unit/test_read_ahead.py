from __future__ import annotations

import io
import random
from collections.abc import Iterator

import pytest

from rvmcv_worker.errors import JobCancelledError
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.read_ahead import ReadAhead
from tests.file_server import sha256_of


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    wish = Interrupt()
    yield wish
    wish.close()


@pytest.mark.parametrize("size_bytes", [0, 1, 9, 10, 11, 35])
def test_all_parts_come_in_order_and_are_hashed_once(interrupt: Interrupt, size_bytes: int) -> None:
    data = random.Random(size_bytes).randbytes(size_bytes)
    source = io.BytesIO(data)
    with ReadAhead(source, size_bytes, 10, interrupt) as ahead:
        parts = [ahead.read(min(10, size_bytes - start)) for start in range(0, size_bytes, 10)]
        assert b"".join(parts) == data
        assert ahead.sha256() == sha256_of(data)
    assert source.tell() == size_bytes


def test_what_was_not_read_to_its_end_has_no_hash(interrupt: Interrupt) -> None:
    with ReadAhead(io.BytesIO(bytes(30)), 30, 10, interrupt) as ahead:
        ahead.read(10)
        with pytest.raises(ValueError, match="20 bytes were not read"):
            ahead.sha256()


def test_a_file_that_became_shorter_is_told_by_its_last_part(interrupt: Interrupt) -> None:
    with ReadAhead(io.BytesIO(bytes(15)), 20, 10, interrupt) as ahead:
        assert len(ahead.read(10)) == 10
        assert len(ahead.read(10)) == 5


def test_the_end_is_heeded_between_two_parts(interrupt: Interrupt) -> None:
    with ReadAhead(io.BytesIO(bytes(30)), 30, 10, interrupt) as ahead:
        ahead.read(10)
        interrupt.request(StopReason.CANCELLED)
        with pytest.raises(JobCancelledError):
            ahead.read(10)
