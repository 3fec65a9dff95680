"""What a bug of ours leaves, or a machine without threads: settled by the daemon that lives on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fault_stage import Stage, open_stage
from tests.worker_process import eventually

pytestmark = pytest.mark.slow

PROGRAM = ("-m", "tests.faulty_worker")


def _stage(directory: Path, fault: str, **options: Any) -> Any:
    return open_stage(directory, scale=0.02, program=PROGRAM, environment={"FAULT": fault}, **options)


def _handed_back(stage: Stage, code: str) -> None:
    """A job's first attempt goes back with this error, by the same daemon; its second completes."""
    job_id = stage.queue()
    assert stage.first_error(job_id)["code"] == code
    job = stage.completes(job_id, attempts=2)
    assert len({attempt["instance_id"] for attempt in job["attempts"]}) == 1, "no start was needed"
    eventually(lambda: stage.server.workers()[0]["status"]["state"] == "ready")
    stage.the_next_job_completes()


def test_a_job_without_a_thread_goes_back_and_its_place_is_free(tmp_path: Path) -> None:
    with _stage(tmp_path, "no thread") as stage:
        _handed_back(stage, "worker_unfit")
        assert "cannot start a thread for the job (can't start new thread)" in stage.worker.log()


@pytest.mark.parametrize("fault", ["no end", "no note of the claim"])
def test_an_attempt_that_a_bug_has_ended_is_handed_back_by_the_daemon_that_lives_on(
    tmp_path: Path, fault: str
) -> None:
    with _stage(tmp_path, fault) as stage:
        _handed_back(stage, "internal")


def test_a_hand_back_that_fails_is_tried_again_until_it_is_done(tmp_path: Path) -> None:
    with _stage(tmp_path, "no settlement:3") as stage:
        job_id = stage.run_until_progress(steps=100_000, step_s=0.05)
        stage.worker.kill()
        first = len(stage.network.requests)
        stage.worker.start()
        # Others' work does not wait for it, and the operator is told.
        stage.network.wait_for(lambda request: request.kind == "offer", since=first)
        told = stage.network.wait_for(
            lambda request: "cannot be handed back" in " ".join(request.said.get("reasons", [])), since=first
        )
        assert told.said["claims"]["train"]
        assert stage.first_error(job_id)["code"] == "worker_died"
        # Only then the lane takes it again, though RVM-Server has offered it since this daemon's first word.
        eventually(lambda: len(stage.server.job(job_id)["attempts"]) == 2)
        assert stage.worker.log().count("not settled: tried again") == 3
        stage.server.cancel(job_id)
        stage.server.wait_until_final(job_id, 30)
        eventually(lambda: stage.server.workers()[0]["status"]["state"] == "ready")
        stage.the_next_job_completes()
