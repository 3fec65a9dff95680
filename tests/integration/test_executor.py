"""Every way a child can end, with the wall and without; the fixture shows that no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker import errors
from rvmcv_worker.compute import stub
from rvmcv_worker.executor import ChildEnd
from rvmcv_worker.interrupt import StopReason
from rvmcv_worker.process_tree import COOKIE, kill_marked
from tests.child_fixtures import Runner, marked_processes, runner, spawner, wall

__all__ = ["runner", "spawner", "wall"]

pytestmark = pytest.mark.slow

DEADLINE_S = 30.0


def test_a_child_that_completes(runner: Runner) -> None:
    end = runner.stub(steps=3, payload_bytes=5000)
    assert isinstance(end, ChildEnd)
    assert end.result["epochs"] == 3
    assert [message["epoch"] for message in runner.progress] == [0, 1, 2, 3]
    assert [len(message.get("history", [])) for message in runner.progress] == [0, 1, 1, 1]
    assert (runner.workspace.out_dir / "train.log").is_file()
    frozen = runner.workspace.read_back("train", "model.bin", max_bytes=5000)
    assert frozen is not None
    assert frozen.read_bytes() == stub.payload(5000)


@pytest.mark.parametrize(
    ("then", "error", "said"),
    [
        ("fail", errors.DatasetInvalidError, "told to fail"),
        ("bug", errors.InternalError, "RuntimeError in the stub child"),
        ("exit", errors.JobCrashedError, "exited with status 3"),
        ("segfault", errors.JobCrashedError, "ended by SIGSEGV"),
        ("garbage_progress", errors.JobCrashedError, "progress pipe: not JSON"),
        ("huge_progress", errors.JobCrashedError, "progress pipe: a header of 4294967295 bytes"),
        ("deep_progress", errors.JobCrashedError, "nested deeper than 32"),
        ("flood_progress", errors.JobCrashedError, "messages in a second"),
        ("no_result", errors.JobCrashedError, "status 0 and without a result"),
        ("garbage_result", errors.JobCrashedError, "result.json: not JSON"),
        ("deep_result", errors.JobCrashedError, "result.json: JSON nested deeper"),
        ("link_result_json", errors.JobCrashedError, "a link"),
        ("fifo_result_json", errors.JobCrashedError, "not a regular file"),
        ("eat_memory", errors.OutOfMemoryError, "limits.max_job_memory_gb"),
        ("fill_disk", errors.DiskQuotaError, "limits.max_workspace_gb"),
    ],
)
def test_a_child_that_fails(runner: Runner, then: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        runner.stub(then, at_most_bytes=16 * 1024**3)
    assert (runner.workspace.out_dir / "train.log").is_file()


def test_files_that_are_removed_and_held_open_count(runner: Runner) -> None:
    body = """
import signal
held = []
for number in range(3):
    held.append(open(f"{directory}/{number}", "wb"))
    os.unlink(f"{directory}/{number}")
    os.posix_fallocate(held[-1].fileno(), 0, 100_000_000)
signal.pause()
"""
    with pytest.raises(errors.DiskQuotaError, match=r"limits\.max_workspace_gb"):
        runner.script(body, timeout_s=20.0)


def test_the_child_cannot_name_an_error_that_is_the_daemons(runner: Runner) -> None:
    with pytest.raises(errors.JobCrashedError, match=r"not its to report: a\\x07b"):
        runner.stub("fail", error_code="worker_stopped", message="a\x07b")


def test_what_was_found_until_the_failure_comes_along(runner: Runner) -> None:
    body = """
with open(directory + "/result.json", "w") as file:
    json.dump({"ok": False, "error": {"code": "dataset_invalid", "message": "m"}, "detail": {"bad": 3}}, file)
sys.exit(1)
"""
    with pytest.raises(errors.DatasetInvalidError) as caught:
        runner.script(body)
    assert caught.value.detail == {"bad": 3}


def test_a_crash_quotes_the_last_lines_with_their_teeth_out(runner: Runner) -> None:
    body = r"""
print("\x1b[31mred\x1b[0m <0>forged\x1b]0;title\x07")
print("10%\r50%\r100%")
os.write(2, b"\xff half a character, and no end")
os._exit(7)
"""
    with pytest.raises(errors.JobCrashedError) as caught:
        runner.script(body)
    expected = [
        "red <0>forged\\x1b]0;title\\x07",
        "100%",
        "\N{REPLACEMENT CHARACTER} half a character, and no end",
    ]
    assert caught.value.message.splitlines()[1:] == expected
    assert (runner.workspace.out_dir / "train.log").read_text().splitlines() == expected


def test_a_log_without_end_is_cut_and_its_end_kept(runner: Runner) -> None:
    body = """
os.write(1, b"first\\n" + (b"x" * 99 + b"\\n") * 12_000 + b"the very last\\n")
answer(done=True)
"""
    assert runner.script(body) == {"done": True}
    log = runner.workspace.out_dir / "train.log"
    lines = log.read_text().splitlines()
    assert 1e6 < log.stat().st_size < 1.1e6
    assert lines[0] == "first"
    assert any("cut: the job wrote more than 1 MB" in line for line in lines)
    assert lines[-1] == "the very last"


def test_a_flood_of_log_does_not_end_the_job(runner: Runner) -> None:
    end = runner.stub("flood_log", at_most_bytes=3_000_000)
    assert end.result["epochs"] == 2
    assert "<0>a line that goes on" in end.log_tail
    assert "\x1b" not in end.log_tail


def test_a_result_of_an_earlier_run_is_not_taken(runner: Runner) -> None:
    runner.stub()
    with pytest.raises(errors.JobCrashedError, match="without a result"):
        runner.stub("no_result")


def test_over_its_time(runner: Runner) -> None:
    with pytest.raises(errors.TimedOutError, match=r"longer than the 0\.5 s"):
        runner.stub("hang", timeout_s=0.5)


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (StopReason.CANCELLED, errors.JobCancelledError),
        (StopReason.FENCED, errors.FencedError),
        (StopReason.WORKER_STOPPED, errors.WorkerStoppedError),
    ],
)
def test_asked_to_end(runner: Runner, reason: StopReason, error: type[Exception]) -> None:
    with pytest.raises(error):
        runner.stub("hang", on_progress=lambda _: runner.interrupt.request(reason))
    assert runner.workspace.read_result("train") == {"ok": False, "stopped": True}  # it heard SIGTERM


def test_asked_to_end_before_the_start(runner: Runner) -> None:
    runner.interrupt.request(StopReason.CANCELLED)
    with pytest.raises(errors.JobCancelledError):
        runner.stub()
    assert not (runner.workspace.root / "train").exists()


def _cancel_at_the_end(runner: Runner) -> Any:
    def on_progress(message: dict[str, Any]) -> None:
        if message["fraction"] == 1:
            runner.interrupt.request(StopReason.CANCELLED)

    return on_progress


def test_a_child_that_ignores_sigterm(runner: Runner) -> None:
    with pytest.raises(errors.JobCancelledError):
        runner.stub("ignore_sigterm", on_progress=_cancel_at_the_end(runner), cancel_grace_s=0.5)


@pytest.mark.parametrize("stay", [False, True])
def test_a_grandchild_in_a_session_of_its_own(runner: Runner, stay: bool) -> None:
    if stay:
        with pytest.raises(errors.JobCancelledError):
            runner.stub(
                "setsid_grandchild", stay=True, on_progress=_cancel_at_the_end(runner), cancel_grace_s=0.5
            )
    else:
        runner.stub("setsid_grandchild")
    assert (runner.workspace.root / "train" / "grandchild.pid").is_file()


def test_an_orphaned_grandchild(runner: Runner) -> None:
    body = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import signal
        while True:
            signal.pause()
    os._exit(0)
os.wait()
answer(done=True)
"""
    assert runner.script(body) == {"done": True}


def test_a_bug_of_the_listener_still_ends_the_tree(runner: Runner) -> None:
    def on_progress(_: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runner.stub("hang", on_progress=on_progress)


def test_what_it_used_is_told(runner: Runner) -> None:
    body = """
import time
held = b"x" * 50_000_000
end = time.process_time() + 1.5
while time.process_time() < end:
    pass
answer(done=True)
"""
    end = runner.run_script(body)
    assert end.peak_memory_bytes > 50_000_000
    assert end.cpu_s > 0.3
    assert end.seconds > 1.5


def test_a_child_is_found_by_the_sweep_of_the_next_start(runner: Runner) -> None:
    killed: list[int] = []

    def sweep(_: dict[str, Any]) -> None:
        killed.append(kill_marked(f"{runner.workspace.root.parent}/"))

    with pytest.raises(errors.JobCrashedError):
        runner.stub("hang", on_progress=sweep)
    assert killed[0] >= 1


def test_the_end_of_one_attempt_is_not_the_end_of_another_whose_name_begins_like_it(tmp_path: Path) -> None:
    first, twelfth = str(tmp_path / "job-1"), str(tmp_path / "job-12")
    waiting = subprocess.Popen(["cat"], stdin=subprocess.PIPE, env={COOKIE: twelfth})
    with waiting:
        try:
            assert kill_marked(first) == 0
            assert waiting.poll() is None
            assert kill_marked(twelfth) == 1
        finally:
            waiting.kill()


DAEMON = """
import sys
from pathlib import Path
from rvmcv_worker import workspace
from rvmcv_worker.executor import ChildSpec, run_child
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.sandbox import Bubblewrap, PlainProcess
from rvmcv_worker.spawner import Spawner
from tests.child_fixtures import LIMITS

with workspace.make(Path(sys.argv[2]), "job", 1) as place:
    run_child(
        ChildSpec("train", {"task": "stub", "then": "hang"}, 60.0),
        workspace=place,
        sandbox=Bubblewrap() if sys.argv[1] == "bubblewrap" else PlainProcess(),
        spawner=Spawner(),
        limits=LIMITS,
        interrupt=Interrupt(),
        on_progress=lambda message: print(message["fraction"], flush=True),
    )
"""


def test_a_child_dies_with_its_daemon(runner: Runner, tmp_path: Path) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, runner.sandbox.name, str(tmp_path / "daemon")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ,
    )
    with daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"0.0\n"
        assert marked_processes(runner.marker)
        daemon.send_signal(signal.SIGKILL)
    deadline_s = time.monotonic() + DEADLINE_S
    while marked_processes(runner.marker) and time.monotonic() < deadline_s:
        os.sched_yield()
