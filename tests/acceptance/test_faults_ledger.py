"""Rows 10, 12, 13, 29, 30, 35 and 41 of the fault list: kills at every step, clocks, and a bad network."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings, Timing
from tests import chaos
from tests.bad_network import Moment
from tests.fault_stage import QUICK, Stage, open_stage
from tests.network_faults import HTML, Behaviour, drop_answer, drop_request, late, says
from tests.worker_process import WorkerProcess, eventually, still_alive

pytestmark = pytest.mark.slow

#: The library that Debian's `faketime` preloads.
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
#: Longer than any back-off of a stage.
SOON_S = 5.0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Files go by job-uploads, so that their upload can be held too."""
    with open_stage(tmp_path_factory.mktemp("ledger"), scale=0.02, s3_keys=False) as opened:
        yield opened


Reach = Callable[[Stage, str], object]


def _state(name: str) -> Reach:
    """Wait until the ledger says that the job is in this state."""

    def reach(stage: Stage, job_id: str) -> None:
        eventually(lambda: [row["state"] for row in stage.worker.ledger("claims")] == [name], every_s=0.001)

    return reach


def _held(kind: str, moment: Moment, phase: str | None = None) -> Reach:
    return lambda stage, job_id: stage.network.hold(kind, moment, job_id=job_id, phase=phase)


def _wiping(stage: Stage, _job_id: str) -> None:
    """Give the workspace many files, and wait until its wipe has begun and is not over."""
    (directory,) = (stage.worker.state_dir / "work").iterdir()
    _many_files(stage).rename(directory / "in" / "many")
    eventually(lambda: stage.worker.ledger("outbox"), every_s=0.0005)


def _many_files(stage: Stage) -> Path:
    many = stage.worker.state_dir.parent / "many"
    if not many.is_dir():
        many.mkdir()
        for number in range(5_000):
            (many / f"{number}").touch()
    return many


#: Each step of a job, in their order: the state that the ledger is in, and how the step is reached.
STEPS: dict[str, tuple[str | None, Reach]] = {
    "claiming, before the server has acted": ("claiming", _held("claim", Moment.BEFORE)),
    "claiming, after it has": ("claiming", _held("claim", Moment.AFTER)),
    "running": ("running", _state("running")),
    "the question before the upload": ("running", _held("progress", Moment.AFTER, phase="upload")),
    "publishing": ("publishing", _held("job-uploads", Moment.BEFORE)),
    "publishing, the slot given": ("publishing", _held("job-uploads", Moment.AFTER)),
    "wiping": (None, _wiping),
    "in the outbox": (None, _held("finish", Moment.BEFORE)),
    "delivered, the answer lost": (None, _held("finish", Moment.AFTER)),
}


#: What was held arrives before the next start, or when the next daemon is at work already.
CASES = [(step, False) for step in STEPS] + [
    (step, True) for step in STEPS if step not in {"running", "wiping"}
]


@pytest.mark.parametrize(("step", "arrives_late"), CASES)
def test_row_12_killed_while(stage: Stage, step: str, arrives_late: bool) -> None:
    state, reach = STEPS[step]
    if step == "wiping":
        _many_files(stage)
        job_id = stage.run_until_progress(steps=20, step_s=0.05)
    else:
        job_id = stage.queue(steps=60 if step == "running" else 1, step_s=0.05)
    held = reach(stage, job_id)
    if held is not None:
        held.wait()
    if state is not None:
        assert [row["state"] for row in stage.worker.ledger("claims")] == [state]
    family = stage.worker.tree()
    stage.worker.kill()
    if step == "wiping":
        assert stage.worker.workspace_files(), "the kill came too late"
    if held is not None and not arrives_late:
        held.release()
    _next_start_settles(stage, family)
    if held is not None:
        held.release()
    job = stage.server.wait_until_final(job_id, 30)
    assert job["status"] == "completed", job
    eventually(lambda: len(stage.network.accepted().get(job_id, ())) == 1)
    stage.nothing_is_left()


def _next_start_settles(stage: Stage, family: list[psutil.Process]) -> None:
    """Start anew: when the daemon says its first word, nothing of the one before may live."""
    first = len(stage.network.requests)
    stage.worker.start()
    stage.network.wait_for(lambda _: True, since=first)
    assert still_alive(family) == []


def test_row_12_killed_while_claimed(tmp_path: Path) -> None:
    """A training fetches its data set while it is `claimed`; one of rubbish ends it without torch."""
    with open_stage(tmp_path, scale=0.02, s3_keys=False, job_types=("yolo11", "stub")) as stage:
        rubbish = tmp_path / "rubbish.zip"
        rubbish.write_bytes(b"this is no archive")
        dataset = stage.server.add_dataset(rubbish, name="rubbish")
        held = stage.network.hold("datasets", Moment.BEFORE)
        stage.server.add_model(rubbish, model_name="yolo11", version="of-ours.pt")
        job_id = stage.server.queue_training({"dataset_id": dataset, "base_model": "of-ours.pt"})
        held.wait()
        assert [row["state"] for row in stage.worker.ledger("claims")] == ["claimed"]
        stage.worker.kill()
        held.release()
        _next_start_settles(stage, [])
        job = stage.server.wait_until_final(job_id, 30)
        codes = [attempt["error"]["code"] for attempt in job["attempts"]]
        assert codes == ["worker_died", "dataset_invalid"]
        eventually(lambda: len(stage.network.accepted().get(job_id, ())) == 1)
        stage.nothing_is_left()


@pytest.mark.parametrize(
    ("kind", "moment"),
    [("claim", Moment.BEFORE), ("claim", Moment.AFTER), ("finish", Moment.BEFORE), ("finish", Moment.AFTER)],
    ids=str,
)
def test_row_12_killed_again_while_the_next_start_settles(stage: Stage, kind: str, moment: Moment) -> None:
    first = stage.network.hold("claim", Moment.AFTER)
    job_id = stage.queue()
    first.wait()
    stage.worker.kill()
    held = stage.network.hold(kind, moment, job_id=job_id)
    stage.worker.start()
    held.wait()
    stage.worker.kill()
    first.release()
    held.release()
    _next_start_settles(stage, [])
    job = stage.server.wait_until_final(job_id, 30)
    assert job["status"] == "completed"
    eventually(lambda: len(stage.network.accepted().get(job_id, ())) == 1)
    stage.nothing_is_left()


def test_row_12_and_35_a_hundred_kills_over_a_bad_network(tmp_path: Path) -> None:
    outcome = chaos.run(tmp_path, jobs=100, kills=100, seed=12, within_s=240)
    assert outcome.kills == 100
    assert outcome.is_clean, outcome


def test_row_35_a_hundred_jobs_over_a_bad_network(tmp_path: Path) -> None:
    outcome = chaos.run(tmp_path, jobs=100, kills=0, seed=35, rate=0.35, within_s=240)
    assert outcome.jobs == 100
    assert outcome.is_clean, outcome


@pytest.mark.parametrize(
    "loss",
    [drop_request, drop_answer, late(0.3), says(502, HTML)],
    ids=["request dropped", "answer dropped", "late", "html"],
)
def test_row_10_a_lost_final_report_is_repeated_and_accepted_once(stage: Stage, loss: Behaviour) -> None:
    rule = stage.network.on("finish", loss, times=2)
    job_id = stage.queue()
    rule.wait()
    stage.completes(job_id)
    stage.nothing_is_left()
    assert len({request.said["finish_id"] for request in stage.network.seen("finish", job_id)}) == 1


def test_row_10_a_result_survives_a_server_that_is_away_at_the_end_and_a_kill(stage: Stage) -> None:
    away = stage.network.on("finish", drop_request, times=None)
    job_id = stage.queue()
    away.wait()
    stage.worker.kill()
    (row,) = stage.worker.ledger("outbox")
    first = len(stage.network.requests)
    stage.worker.start()
    stage.network.wait_for(lambda request: request.kind == "finish", since=first)
    away.release()
    stage.completes(job_id)
    stage.nothing_is_left()
    assert stage.network.accepted()[job_id] == {row["finish_id"]}


def _cut_in_half(ledger: Path) -> None:
    data = ledger.read_bytes()
    ledger.write_bytes(data[: len(data) // 2])


def _overwrite(ledger: Path) -> None:
    ledger.write_bytes(b"this is no database, and never was one\n" * 500)


def _empty(ledger: Path) -> None:
    ledger.write_bytes(b"")


def _cut_the_log(ledger: Path) -> None:
    log = ledger.with_name(ledger.name + "-wal")
    log.write_bytes(log.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "set_aside"),
    [(_cut_in_half, True), (_overwrite, True), (_empty, False), (_cut_the_log, False)],
)
def test_row_13_a_half_written_ledger_is_recovered_or_set_aside(
    stage: Stage, damage: Callable[[Path], None], set_aside: bool
) -> None:
    held = stage.network.hold("finish", Moment.BEFORE)
    job_id = stage.queue()
    held.wait()
    stage.worker.kill()
    held.release()
    eventually(lambda: stage.network.accepted().get(job_id))
    if damage is not _cut_the_log:
        stage.worker.ledger("outbox")  # the last one to close it puts the log into the file
    before = len(stage.worker.log())
    damage(stage.worker.ledger_file)
    stage.worker.start()
    stage.the_next_job_completes()
    told = stage.worker.log()[before:]
    named = list(stage.worker.state_dir.glob("ledger.sqlite3.broken-*"))
    assert any(str(path) in told for path in named) == set_aside
    for path in named:
        path.unlink()


def test_row_29_a_second_daemon_on_the_same_state_ends_with_its_own_code(stage: Stage) -> None:
    command = [sys.executable, "-m", "rvmcv_worker.cli", "run", "--config", str(stage.worker.config_file)]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert second.returncode == ExitCode.ALREADY_RUNNING
    assert "another rvmcv-worker works on" in second.stderr
    stage.the_next_job_completes()


@pytest.mark.skipif(FAKETIME is None, reason="no libfaketime: apt install faketime")
def test_row_30_no_deadline_moves_when_the_wall_clock_jumps(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    # libfaketime's clock_nanosleep fails with EINVAL when its moment has passed while it was called.
    (tmp_path / "sitecustomize.py").write_text(
        "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
    )
    environment = {
        "PYTHONPATH": str(tmp_path),
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }

    def jump(days: int) -> None:
        fresh = clock.with_suffix(".new")
        fresh.write_text(f"{days:+}d\n")
        fresh.replace(clock)

    jump(0)
    timing = Timing(lease_train_s=3.0, report_interval_s=1.0, hand_back_delay_s=0.1, reap_every_s=0.1)
    with open_stage(tmp_path, timing=timing, s3_keys=False, environment=environment) as stage:
        # A back-off and a running job, over both jumps: no lease is lost, nothing is waited for longer.
        job_id = stage.run_until_progress(steps=80, step_s=0.05)
        for days in (40, -40):
            jump(days)
            seen = len(stage.network.requests)
            stage.network.wait_for(lambda r: r.kind == "worker-status", SOON_S, since=seen + 3)
            stage.network.wait_for(lambda r: r.kind == "progress", SOON_S, since=seen + 3)
        stage.completes(job_id)
        # A report that waits is not seven days old because a clock says so.
        away = stage.network.on("finish", says(503, HTML), times=None)
        waiting = stage.queue()
        away.wait()
        jump(40)
        first = len(stage.network.requests)
        stage.network.wait_for(lambda r: r.kind == "finish", SOON_S, since=first + 2)
        away.release()
        stage.completes(waiting)
        assert any(
            line.startswith(time.strftime("%Y-", time.localtime(time.time() + 40 * 86400)))
            for line in stage.worker.log().splitlines()
        ), "the daemon's wall clock did jump"
        stage.the_next_job_completes()
        assert stage.worker.stop(10) == 0, "nothing counts what the jump skipped"


def test_row_41_after_an_outage_every_lease_is_expired_and_the_training_keeps_its_job(tmp_path: Path) -> None:
    timing = Timing(
        lease_train_s=1.0, report_interval_s=1.0, reap_every_s=0.1, status_idle_s=0.5, status_busy_s=0.5
    )
    settings = Settings(timing=timing)

    def worker(name: str, server: ReferenceServer) -> WorkerProcess:
        return WorkerProcess(tmp_path / name, server, worker_id=name, s3_keys=False, scale=0.2, extra=QUICK)

    with ReferenceServer(tmp_path / "server", settings=settings) as server:
        port, s3_port = (int(url.rsplit(":", 1)[1]) for url in (server.url, server.s3_endpoint))
        busy, idle = worker("busy", server), worker("idle", server)
        busy.start()
        job_id = server.queue_training({"steps": 100, "step_s": 0.05}, job_type="stub")
        server.wait_for_job(job_id, lambda job: bool(job["fraction"]), 20)
        idle.start()
        eventually(lambda: len(server.workers()) == 2)
    with closing(busy), closing(idle):
        busy_pid = busy.pid
        assert still_alive(busy.tree())
        eventually(lambda: "lane train waits" in idle.log())
        threading.Event().wait(4 * timing.lease_train_s)  # an outage has a length: nothing tells its end
        with ReferenceServer(tmp_path / "server", settings=settings, port=port, s3_port=s3_port) as server:
            job = server.wait_until_final(job_id, 60)
            assert (job["status"], len(job["attempts"])) == ("completed", 1), job["attempts"]
            assert job["attempts"][0]["worker_id"] == "busy"
            assert server.polls > 0
        assert busy.pid == busy_pid


def test_row_12_killed_while_a_start_tries_out_the_wall(tmp_path: Path) -> None:
    with open_stage(tmp_path, scale=0.02, start=False) as stage:
        stage.worker.start()
        work_dir = stage.worker.state_dir / "work"
        eventually(lambda: list(work_dir.glob("rvmcv-probe-*")), every_s=0.001)
        stage.worker.kill()
        assert stage.worker.workspace_files()
        stage.worker.start()
        stage.the_next_job_completes()
        named = [
            p for p in psutil.process_iter(["cmdline"]) if str(work_dir) in " ".join(p.info["cmdline"] or ())
        ]
        assert still_alive(named) == []
