"""A child in several ranks under torchrun, behind the wall and without it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rvmcv_worker.errors import DatasetInvalidError, JobCancelledError, JobCrashedError, OutOfGpuMemoryError
from rvmcv_worker.interrupt import StopReason
from rvmcv_worker.sandbox import PlainProcess
from tests.child_fixtures import Runner, runner, spawner, wall

__all__ = ["runner", "spawner", "wall"]

pytest.importorskip("torch", reason="the extra `compute` is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def loopback(runner: Runner) -> None:
    if isinstance(runner.sandbox, PlainProcess):
        runner.gpus = (0, 1)  # without a wall only a job on several GPUs gets to the loopback


def test_rank_0_speaks_for_all(runner: Runner) -> None:
    end = runner.stub(ranks=2, steps=3)
    assert end.result["epochs"] == 3
    assert [entry["epoch"] for said in runner.progress for entry in said.get("history", [])] == [1, 2, 3]


def test_a_rank_that_dies_without_a_word_ends_all(runner: Runner) -> None:
    with pytest.raises(JobCrashedError, match="rank 1 of 2 ended with SIGSEGV"):
        runner.stub("hang", ranks=2, rank_then={"1": "segfault"})


@pytest.mark.parametrize(
    ("code", "error"), [("out_of_gpu_memory", OutOfGpuMemoryError), ("dataset_invalid", DatasetInvalidError)]
)
def test_a_ranks_own_fault_is_the_jobs(runner: Runner, code: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="the stub was told to fail"):
        runner.stub("hang", ranks=2, rank_then={"1": "fail"}, error_code=code)


def test_a_fault_of_one_rank_goes_before_what_it_did_to_the_other(runner: Runner) -> None:
    with pytest.raises(OutOfGpuMemoryError):
        runner.stub("bug_when_stopped", ranks=2, rank_then={"1": "fail"}, error_code="out_of_gpu_memory")


@pytest.mark.parametrize("ending", ["hang", "ignore_sigterm"])
def test_a_cancel_ends_every_rank(runner: Runner, ending: str) -> None:
    def cancel(said: dict[str, Any]) -> None:
        if said.get("epoch") == 2:
            runner.interrupt.request(StopReason.CANCELLED)

    started_s = time.monotonic()
    with pytest.raises(JobCancelledError):
        runner.stub(ending, ranks=2, steps=2, on_progress=cancel, cancel_grace_s=3.0)
    assert time.monotonic() - started_s < 60
