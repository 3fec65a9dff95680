from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rvmcv_worker.compute import stub
from tests.compute_child import ComputeChild


def run(root: Path, **job: object) -> ComputeChild:
    child = ComputeChild(root, "train", {"task": "stub", "steps": 3, "step_s": 0.0, **job})
    for _ in child.messages():
        pass
    child.process.wait(timeout=30)
    return child


def test_it_completes_as_a_training_does(tmp_path: Path) -> None:
    child = run(tmp_path, payload_bytes=1000)

    result = child.result()["result"]
    assert (child.directory / result["model"]).read_bytes() == stub.payload(1000)
    assert [entry["epoch"] for message in child.received for entry in message.get("history", [])] == [1, 2, 3]
    assert child.process.returncode == 0


@pytest.mark.parametrize(
    ("then", "code"), [("fail", "dataset_invalid"), ("bug", "internal"), ("no such ending", "invalid_job")]
)
def test_it_fails_with_a_result(tmp_path: Path, then: str, code: str) -> None:
    child = run(tmp_path, then=then)

    assert child.result()["error"]["code"] == code
    assert child.process.returncode == 1


@pytest.mark.parametrize(("then", "status"), [("exit", 7), ("segfault", -signal.SIGSEGV), ("no_result", 0)])
def test_it_crashes_without_a_result(tmp_path: Path, then: str, status: int) -> None:
    child = run(tmp_path, then=then, exit_code=7)

    assert child.process.returncode == status
    assert not (child.directory / "result.json").exists()


@pytest.mark.parametrize("then", ["link_result", "hard_link_result", "fifo_result", "directory_result"])
def test_it_puts_something_else_where_the_model_belongs(tmp_path: Path, then: str) -> None:
    target = tmp_path / "secret"
    target.write_text("token")
    child = run(tmp_path, then=then, target=str(target))

    model = child.directory / "model.bin"
    assert model.is_symlink() or not model.is_file() or model.stat().st_nlink > 1
    assert child.result()["ok"]


def test_it_hangs_until_it_is_asked_to_stop(tmp_path: Path) -> None:
    child = ComputeChild(tmp_path, "train", {"task": "stub", "steps": 1, "then": "hang"})
    for message in child.messages():
        if message["fraction"] == 1:
            child.process.send_signal(signal.SIGTERM)

    assert child.result() == {"ok": False, "stopped": True}
