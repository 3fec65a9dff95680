"""A server that takes every request and answers none: a stop, a cancel, and a start that has to settle."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.bad_network import Hold, Moment
from tests.fault_stage import Stage, open_stage
from tests.network_faults import half_open
from tests.worker_process import eventually

pytestmark = pytest.mark.slow

#: As in production: no deadline of a request ends before the stop is to be over.
LONG = {"server": {"connect_timeout_s": 10.0, "read_timeout_s": 30.0, "poll_wait_s": 1}}
#: Beside the waits for a claim on its way (5 s) and for the delivery of final reports (10 s).
SLACK_S = 5.0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with open_stage(tmp_path_factory.mktemp("silent"), scale=0.02, s3_keys=False, extra=LONG) as opened:
        yield opened


def _asked(stage: Stage, kind: str) -> tuple[str, Hold]:
    """Queue a job, and return once it waits for an answer that does not come."""
    held = stage.network.hold(kind, Moment.BEFORE, phase="upload" if kind == "progress" else None)
    job_id = stage.queue()
    held.wait()
    return job_id, held


@pytest.mark.parametrize("kind", ["progress", "job-uploads"])
def test_row_11_a_stop_does_not_wait_for_an_answer(stage: Stage, kind: str) -> None:
    job_id, held = _asked(stage, kind)
    start_s = time.monotonic()
    assert stage.worker.stop() == 0
    assert time.monotonic() - start_s < SLACK_S
    job = stage.server.job(job_id)
    assert (job["status"], job["attempts"][0]["error"]["code"]) == ("queued", "worker_stopped")
    stage.nothing_is_left()
    held.release()
    stage.worker.start()
    stage.completes(job_id, attempts=2)
    stage.nothing_is_left()


def test_row_11_a_stop_ends_when_nothing_is_answered_at_all(stage: Stage) -> None:
    job_id, held = _asked(stage, "progress")
    with stage.network.all_requests(half_open):
        start_s = time.monotonic()
        assert stage.worker.stop() == 0
        assert time.monotonic() - start_s < 5 + 10 + SLACK_S
    assert stage.worker.ledger("claims") == []
    (waiting,) = stage.worker.ledger("outbox")
    assert json.loads(waiting["body"])["error"]["code"] == "worker_stopped"
    assert stage.worker.workspace_files() == []
    held.release()
    stage.worker.start()
    stage.completes(job_id, attempts=2)
    stage.nothing_is_left()


def test_row_09_a_cancel_does_not_wait_for_an_answer(stage: Stage) -> None:
    job_id, held = _asked(stage, "progress")
    start_s = time.monotonic()
    stage.server.cancel(job_id)
    assert stage.server.wait_until_final(job_id, 20)["status"] == "cancelled"
    assert time.monotonic() - start_s < SLACK_S
    stage.nothing_is_left()
    held.release()


def test_a_start_that_cannot_settle_says_so_and_claims_nothing(stage: Stage) -> None:
    claim = stage.network.hold("claim", Moment.AFTER)
    job_id = stage.queue()
    claim.wait()
    stage.worker.kill()
    claim.release()
    with stage.network.all_requests(half_open) as silence:
        stage.worker.start()
        silence.wait()
        status = _status(stage)
        assert status["state"] == "degraded"
        assert status["claims"] == {"train": False, "infer": False, "batch": False}
        assert "nothing is claimed until then" in status["reasons"][0]
        assert status["claiming"] == 1
        stage.worker.stop()
    stage.worker.start()
    stage.completes(job_id, attempts=2)
    eventually(lambda: _status(stage)["claims"]["train"] and not _status(stage)["reasons"])
    stage.nothing_is_left()


def _status(stage: Stage) -> dict[str, Any]:
    command = [sys.executable, "-m", "rvmcv_worker.cli", "status", "--json", "--config"]
    found = subprocess.run(
        [*command, str(stage.worker.config_file)], capture_output=True, check=True, timeout=30
    )
    return dict(json.loads(found.stdout))
