"""The parts of install.sh that are Python: readiness, the ledger's copy, the wheelhouse."""

from __future__ import annotations

import hashlib
import http.server
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from installer import ledger_backup, readiness, wheelhouse
from rvmcv_worker.ledger import Ledger

SOURCE = Path(__file__).parents[2]
REFUSED = "GET /api/v1/cv/job-status: Connection refused"


def said(state: str, *reasons: str, version: str = "2") -> dict[str, object]:
    return {"version": version, "state": state, "reasons": list(reasons)}


@pytest.mark.parametrize(
    ("before", "now", "in_the_way"),
    [
        (said("ready"), said("ready"), None),
        (said("busy"), said("paused"), None),
        (said("ready"), said("ready", version="1"), "version 1 answers"),
        (said("ready"), said("degraded", REFUSED), REFUSED),
        (said("paused", "10 GB free"), said("degraded", "10 GB free"), "10 GB free"),
        (said("degraded", REFUSED), said("degraded", REFUSED), None),
        (said("degraded", "9.1 GB free at /"), said("degraded", "8.7 GB free at /"), None),
        (said("degraded", REFUSED), said("degraded", REFUSED, "no wall, no claims"), ": no wall, no"),
        ({}, said("degraded", REFUSED), None),
        ({}, {}, "version None answers"),
    ],
)  # fmt: skip
def test_a_release_is_held_to_how_the_one_before_was(before, now, in_the_way):
    found = readiness.in_the_way(before, now, "2")
    assert found is None if in_the_way is None else in_the_way in str(found)


@pytest.mark.parametrize(("answer", "code"), [("the worker does not run", 1), ("[]", 1), ('"x"', 1), ("", 1)])
def test_what_is_no_status_is_no_readiness(answer, code, tmp_path):
    (tmp_path / "before.json").write_text("{}")
    run = subprocess.run(
        [sys.executable, "-I", SOURCE / "installer/readiness.py", tmp_path / "before.json", "2"],
        input=answer, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == code
    assert "does not answer" in run.stdout


def test_the_ledger_is_copied_while_somebody_has_it_open_and_old_copies_go(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite3")
    ledger.begin_claim("job-1", "stub", "claim-1")
    backup = tmp_path / "backup"
    backup.mkdir()
    for number in range(ledger_backup.KEPT):
        (backup / f"ledger-0.{number}-x.sqlite3").write_text("older")
    assert ledger_backup.main(tmp_path, "0.9") == 0
    ledger.close()
    copies = sorted(backup.iterdir())
    (copy,) = (each for each in copies if each.name.startswith("ledger-0.9-"))
    assert len(copies) == ledger_backup.KEPT
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert sqlite3.connect(copy).execute("SELECT job_id FROM claims").fetchall() == [("job-1",)]


def test_no_ledger_is_nothing_to_copy_and_a_broken_one_is_told(tmp_path, capsys):
    assert ledger_backup.main(tmp_path, "1") == 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "ledger.sqlite3").write_bytes(b"no database" * 100)
    assert ledger_backup.main(tmp_path, "1") == 1
    assert "cannot be copied" in capsys.readouterr().err


def test_the_lock_is_taken_apart_without_a_rest():
    lock = (SOURCE / "requirements.lock").read_text()
    found = wheelhouse.stanzas(lock)
    assert len(found) == sum("==" in line and not line.startswith((" ", "#")) for line in lock.splitlines())
    assert sum(len(each.hashes) for each in found.values()) == lock.count("--hash=sha256:")
    assert {name for name, _ in found} >= set(wheelhouse.TOOLS)


def test_a_source_archive_that_is_not_the_locked_one_is_not_kept(tmp_path):
    content = b"a source archive"

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever).start()
        file = {"url": f"http://127.0.0.1:{server.server_port}/a.tar.gz", "filename": "a.tar.gz"}
        try:
            with pytest.raises(SystemExit, match="not the file that"):
                wheelhouse.fetch_source(
                    {**file, "hashes": {"sha256": "0" * 64}}, "https://index.test/simple", tmp_path
                )
            assert list(tmp_path.iterdir()) == []
            digest = hashlib.sha256(content).hexdigest()
            wheelhouse.fetch_source(
                {**file, "hashes": {"sha256": digest}}, "https://index.test/simple", tmp_path
            )
        finally:
            server.shutdown()
    assert (tmp_path / "a.tar.gz").read_bytes() == content
