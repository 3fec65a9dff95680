from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from rvmcv_worker.ledger import ClaimState, Ledger, LedgerUnavailableError


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


#: The file as version 0.1.0 made it, with a report that nobody has taken yet.
_SCHEMA_1 = """
CREATE TABLE claims (job_id TEXT PRIMARY KEY, job_type TEXT NOT NULL, claim_id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL, attempt INTEGER, lease_token TEXT, changed_at REAL NOT NULL);
CREATE TABLE outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL,
    finish_id TEXT NOT NULL UNIQUE, body TEXT NOT NULL, courtesy TEXT, created_at REAL NOT NULL);
INSERT INTO outbox VALUES (7, 'job1', 'f1', '{"status": "completed"}', NULL, 1800000000.0);
PRAGMA user_version=1;
"""


def test_an_older_schema_is_copied_then_brought_up_to_date(file: Path) -> None:
    with sqlite3.connect(file) as old:
        old.executescript(_SCHEMA_1)
    ledger = Ledger(file)
    ledger.waited(5.0)
    (row,) = ledger.outbox()
    assert (row.seq, row.job_id, row.waited_s) == (7, "job1", 5.0)
    copy = file.with_name("ledger.sqlite3.schema-1")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with sqlite3.connect(copy) as kept:
        assert kept.execute("PRAGMA user_version").fetchone() == (1,)
        assert kept.execute("SELECT job_id FROM outbox").fetchall() == [("job1",)]


def test_a_newer_workers_file_is_read_and_its_unknown_step_hands_back(file: Path, logged: list[str]) -> None:
    Ledger(file).begin_claim("job1", "yolo11", "c1")
    with sqlite3.connect(file) as newer:
        newer.executescript(
            "ALTER TABLE claims ADD COLUMN planet TEXT; UPDATE claims SET state = 'warping';"
            "PRAGMA user_version=99;"
        )
    (row,) = Ledger(file).claims()
    assert (row.job_id, row.state) == ("job1", ClaimState.UNKNOWN)
    assert any("newer worker" in line for line in logged)


def test_a_file_that_another_holds_is_left_as_it_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(file).close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: connect(*args, **{**more, "timeout": 0.1}))
    with connect(file, isolation_level=None) as holder:
        holder.execute("PRAGMA locking_mode=EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LedgerUnavailableError, match="locked"):
            Ledger(file)
    assert not list(file.parent.glob("*broken*"))


def test_reports_count_the_time_that_they_waited_not_the_clocks(file: Path) -> None:
    ledger = Ledger(file)
    for name in ("a", "b"):
        ledger.begin_claim(name, "yolo11", name)
        ledger.finish(name, _report(name, f"finish-{name}"))
        ledger.waited(10.0)
    assert [row.waited_s for row in Ledger(file).outbox()] == [20.0, 10.0]


def test_a_report_that_cannot_be_read_is_set_aside_and_the_others_are_delivered(
    file: Path, logged: list[str]
) -> None:
    ledger = Ledger(file)
    for name in ("a", "b"):
        ledger.begin_claim(name, "yolo11", name)
        ledger.finish(name, _report(name, f"finish-{name}"))
    with sqlite3.connect(file) as spoiler:
        spoiler.execute("UPDATE outbox SET body = substr(body, 1, 20) WHERE job_id = 'a'")
    assert [row.job_id for row in ledger.outbox()] == ["b"]
    (aside,) = file.parent.glob("*.broken")
    assert "finish-a" in aside.read_text()
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert any(str(aside) in line for line in logged)
    assert not ledger.knows("a")


def test_a_database_that_is_no_ledger_is_set_aside(file: Path, logged: list[str]) -> None:
    with sqlite3.connect(file) as other:
        other.executescript("CREATE TABLE claims (planet TEXT); PRAGMA user_version=2;")
    assert Ledger(file).claims() == []
    assert any("not a ledger" in line for line in logged)


def test_a_directory_in_its_place_is_told(file: Path) -> None:
    file.mkdir()
    with pytest.raises(LedgerUnavailableError, match="cannot be opened"):
        Ledger(file)


def test_a_file_that_others_could_read_is_closed_to_them(file: Path) -> None:
    Ledger(file).close()
    file.chmod(0o644)
    Ledger(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_waits_is_named_without_waiting_for_a_ledger_that_hangs(file: Path) -> None:
    ledger = Ledger(file)
    ledger.begin_claim("job1", "yolo11", "c1")
    ledger.finish("job1", _report("job1"))
    ledger.begin_claim("job2", "yolo11", "c2")
    waiting = ledger.waiting(1.0)
    assert waiting is not None
    assert (waiting.claims, waiting.reports) == ({"job2"}, {"job1"})
    with ledger._lock:  # as long as a write hangs
        assert ledger.waiting(0.01) is None
