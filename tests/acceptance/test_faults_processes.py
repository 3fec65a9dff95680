"""Rows 9, 11, 14 to 16 and 37 to 39 of the fault list: leases, stops, and children that misbehave."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from rvmcv_worker.reference.settings import Timing
from tests.fault_stage import Stage, open_stage
from tests.network_faults import drop_request
from tests.reference_talker import Talker
from tests.worker_process import eventually, still_alive

pytestmark = pytest.mark.slow

LEASE_S = 1.0
CANCEL_GRACE_S = 0.5
#: What a kill, a wipe and two processes' turns take beside the waiting times, on a busy machine.
SLACK_S = 2.0
TERM_GRACE_S = 3.0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Short leases, which nothing but the worker's keep-alives holds."""
    timing = Timing(
        lease_train_s=LEASE_S,
        report_interval_s=1.0,
        hand_back_delay_s=0.1,
        reap_every_s=0.1,
        offer_hold_s=0.1,
    )
    limits: dict[str, object] = {
        "cancel_grace_s": CANCEL_GRACE_S,
        "term_grace_s": TERM_GRACE_S,
        "max_log_mb": 1.0,
    }
    with open_stage(
        tmp_path_factory.mktemp("processes"), timing=timing, scale=0.02, extra={"limits": limits}
    ) as opened:
        yield opened


@pytest.mark.parametrize("then", ["complete", "ignore_sigterm", "setsid_grandchild"])
def test_row_09_a_lost_lease_ends_the_tree_and_nothing_is_told(stage: Stage, then: str) -> None:
    steps = 100_000 if then == "complete" else 1
    job_id = stage.run_until_progress(steps=steps, step_s=0.05, then=then, stay=True)
    family = stage.worker.tree()
    other = Talker(stage.server, "stub")
    with stage.network.all_requests(drop_request):
        eventually(lambda: any(job["job_id"] == job_id for job in other.poll(wait=1)))
        result = {"who": "the other"}
        assert other.finish(job_id, other.take(job_id), "completed", result=result).status_code == 200
        first = len(stage.network.requests)
    start_s = time.monotonic()
    psutil.wait_procs(family, timeout=20)
    assert still_alive(family) == []
    assert time.monotonic() - start_s < 3 * 0.02 + CANCEL_GRACE_S + SLACK_S
    eventually(lambda: "lease lost" in stage.worker.log())
    stage.nothing_is_left()
    told = {request.kind for request in stage.network.requests[first:] if request.job_id == job_id}
    assert told <= {"progress"}, "no upload and no report"
    assert stage.server.job(job_id)["result"] == result


@pytest.mark.parametrize("then", ["complete", "ignore_sigterm", "setsid_grandchild"])
def test_row_09_and_16_a_cancel_ends_the_whole_tree(stage: Stage, then: str) -> None:
    steps = 100_000 if then == "complete" else 1
    job_id = stage.run_until_progress(steps=steps, step_s=0.05, then=then, stay=True)
    family = stage.worker.tree()
    assert family
    stage.server.cancel(job_id)
    start_s = time.monotonic()
    psutil.wait_procs(family, timeout=20)
    assert time.monotonic() - start_s < 3 * 0.02 + CANCEL_GRACE_S + SLACK_S
    assert stage.server.wait_until_final(job_id, 30)["status"] == "cancelled"
    assert still_alive(family) == []
    stage.nothing_is_left()
    assert stage.network.seen("job-uploads", job_id) == []


def test_row_11_sigterm_hands_the_job_back_and_keeps_the_lease_meanwhile(stage: Stage) -> None:
    job_id = stage.run_until_progress(then="ignore_sigterm")
    family = stage.worker.tree()
    start_s = time.monotonic()
    assert stage.worker.stop() == 0
    assert TERM_GRACE_S <= time.monotonic() - start_s < TERM_GRACE_S + SLACK_S + 2
    assert still_alive(family) == []
    assert stage.worker.workspace_files() == []
    job = stage.server.job(job_id)
    assert (job["status"], len(job["attempts"])) == ("queued", 1)
    assert job["attempts"][0]["error"]["code"] == "worker_stopped", (
        "not lease_expired: the stop took three leases"
    )
    assert not job["attempts"][0]["counts"]
    stage.server.cancel(job_id)
    stage.worker.start()
    stage.the_next_job_completes()


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("segfault", "SIGSEGV"),
        ("exit", "exited with status 3"),
        ("no_result", "without a result"),
        ("garbage_result", "result.json"),
        ("garbage_progress", "progress"),
        # 37: what it swaps for something else is not read
        ("link_result", "model.bin"),
        ("fifo_result", "model.bin"),
        ("directory_result", "model.bin"),
        ("hard_link_result", "model.bin"),
        ("link_result_json", "result.json"),
        ("fifo_result_json", "result.json"),
        # 38: what it says is too much or too deep
        ("deep_result", "result.json"),
        ("deep_progress", "progress"),
        ("huge_progress", "progress"),
        ("flood_progress", "progress"),
    ],
)
def test_row_15_37_and_38_a_child_that_misbehaves_has_crashed(
    stage: Stage, tmp_path: Path, then: str, said: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("canary-of-a-secret")
    # A hard link to what lies behind the wall cannot even be made; one to its own file is refused too.
    target = "train/job.json" if then == "hard_link_result" else str(secret)
    job_id = stage.queue(then=then, target=target)
    error = stage.first_error(job_id)
    assert error["code"] == "job_crashed"
    assert said in error["message"]
    assert stage.network.seen("job-uploads", job_id) == []
    assert b"canary-of-a-secret" not in b"".join(request.body for request in stage.network.requests)
    stage.server.cancel(job_id)
    stage.the_next_job_completes()


def test_row_15_a_bug_of_ours_is_told_from_a_crash(stage: Stage) -> None:
    job_id = stage.queue(then="bug")
    assert stage.first_error(job_id)["code"] == "internal"
    stage.server.cancel(job_id)
    stage.nothing_is_left()


def test_row_38_a_flooded_log_is_escaped_and_cut(stage: Stage) -> None:
    before = len(stage.worker.log())
    job_id = stage.queue(then="flood_log", at_most_bytes=4_000_000)
    stage.completes(job_id)
    grown = stage.worker.log()[before:]
    assert "\x1b" not in grown
    assert not [line for line in grown.splitlines() if line.startswith("<0>")]
    assert len(grown) < 3_000_000


def test_row_39_losses_that_are_no_numbers_are_null_and_the_job_completes(stage: Stage) -> None:
    job_id = stage.queue(steps=3, loss="nan")
    job = stage.completes(job_id)
    assert [entry["losses"]["box_loss"] for entry in job["history"]] == [None] * 3
    assert job["result"]["stub"]["metrics"]["loss"] is None


def test_row_14_the_watchdog_starves_when_the_main_loop_hangs(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as notified:
        notified.bind(str(address))
        with open_stage(tmp_path, environment={"NOTIFY_SOCKET": str(address)}) as stage:
            _hear(notified, b"READY=1", within_s=10)
            _hear(notified, b"WATCHDOG=1", within_s=5)
            with _stopped_thread(stage.worker.pid):
                _empty(notified)
                stage.completes(stage.queue())  # every other thread goes on
                notified.settimeout(2.5)
                with pytest.raises(TimeoutError):
                    notified.recv(4096)
            _hear(notified, b"WATCHDOG=1", within_s=5)


def _hear(notified: socket.socket, line: bytes, within_s: float) -> None:
    notified.settimeout(within_s)
    while line not in notified.recv(4096).split(b"\n"):
        pass


def _empty(notified: socket.socket) -> None:
    notified.settimeout(0.05)
    try:
        while True:
            notified.recv(4096)
    except TimeoutError:
        pass


_PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_DETACH, _WALL = 0x4206, 0x4207, 17, 0x40000000


@contextmanager
def _stopped_thread(thread_id: int) -> Iterator[None]:
    """Stop one thread of another process, as a debugger does; skips where that is not allowed."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if ptrace(_PTRACE_SEIZE, thread_id, None, None) != 0:
        pytest.skip(f"no ptrace here: {os.strerror(ctypes.get_errno())}")
    assert ptrace(_PTRACE_INTERRUPT, thread_id, None, None) == 0
    os.waitpid(thread_id, _WALL)
    yield
    assert ptrace(_PTRACE_DETACH, thread_id, None, None) == 0
