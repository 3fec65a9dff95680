from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from rvmcv_worker.ledger import ClaimState, Ledger


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


def _report(job_id: str, finish_id: str = "f1") -> dict[str, object]:
    return {"event": "finish", "job_id": job_id, "finish_id": finish_id, "status": "completed"}


def test_a_claim_is_known_before_its_answer_and_after_a_restart(file: Path) -> None:
    ledger = Ledger(file)
    ledger.begin_claim("job1", "yolo11", "c1")
    ledger.close()
    (row,) = Ledger(file).claims()
    assert (row.job_id, row.claim_id, row.state, row.lease_token) == ("job1", "c1", ClaimState.CLAIMING, None)


def test_the_report_enters_as_the_claim_leaves(file: Path) -> None:
    ledger = Ledger(file)
    ledger.begin_claim("job1", "yolo11", "c1")
    ledger.claimed("job1", 1, "lease")
    ledger.enter("job1", ClaimState.RUNNING)
    ledger.finish("job1", _report("job1"), {"training_job_id": 17})
    assert ledger.claims() == []
    (row,) = ledger.outbox()
    assert row.body["status"] == "completed"
    assert row.courtesy == {"training_job_id": 17}
    assert ledger.knows("job1")
    ledger.delivered(row.seq)
    assert not ledger.knows("job1")


def test_a_failed_transaction_changes_nothing(file: Path) -> None:
    ledger = Ledger(file)
    ledger.begin_claim("job1", "yolo11", "c1")
    ledger.finish("job1", _report("job1", "same"))
    ledger.begin_claim("job2", "yolo11", "c2")
    with pytest.raises(sqlite3.IntegrityError):
        ledger.finish("job2", _report("job2", "same"))
    assert [row.job_id for row in ledger.claims()] == ["job2"]
    assert [row.job_id for row in ledger.outbox()] == ["job1"]


def test_reports_keep_their_order(file: Path) -> None:
    ledger = Ledger(file)
    for name in ("b", "a", "c"):
        ledger.begin_claim(name, "yolo11", name)
        ledger.finish(name, _report(name, f"finish-{name}"))
    assert [row.job_id for row in ledger.outbox()] == ["b", "a", "c"]


def test_only_the_owner_can_read_it(file: Path) -> None:
    ledger = Ledger(file)
    ledger.begin_claim("job1", "yolo11", "c1")
    for path in file.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_broken_file_is_set_aside_and_said(file: Path, logged: list[str]) -> None:
    file.write_bytes(b"not a database at all" * 100)
    ledger = Ledger(file)
    assert ledger.claims() == []
    assert len(list(file.parent.glob("ledger.sqlite3.broken-*[0-9]"))) == 1
    assert any("set aside" in line for line in logged)
