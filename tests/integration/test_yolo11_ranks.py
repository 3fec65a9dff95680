"""A real training in two ranks: gloo on the CPU, started and watched as the daemon does, behind the wall."""

from __future__ import annotations

from typing import Any

import pytest

from rvmcv_worker.errors import JobCancelledError, OutOfGpuMemoryError
from rvmcv_worker.interrupt import StopReason
from rvmcv_worker.launch import PYTHON
from tests.child_fixtures import Runner, spawner, wall, walled
from tests.drawn_dataset import draw, write_yaml

__all__ = ["spawner", "wall", "walled"]

pytest.importorskip("torch", reason="the extra `compute` is not installed")
pytestmark = pytest.mark.slow

#: The train child, each rank too; in rank 1 the optimizer's step runs out of memory from the second epoch on.
SHORT_OF_MEMORY = """
import os, sys
code = sys.orig_argv[sys.orig_argv.index("-c") + 1]
sys.argv = ["child", sys.argv[-1]]
from rvmcv_worker.compute import child, ranks, ultralytics_env
ranks._PYTHON = (sys.executable, "-I", "-B", "-u", "-c", code)
require_safe_load = ultralytics_env.require_safe_load
def patched():
    require_safe_load()
    import torch
    from ultralytics.engine.trainer import BaseTrainer
    step = BaseTrainer.optimizer_step
    def optimizer_step(self):
        if self.epoch >= 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(self)
    BaseTrainer.optimizer_step = optimizer_step
if os.environ.get("RANK") == "1":
    ultralytics_env.require_safe_load = patched
sys.exit(child.main())
"""
OPTIONS = {"epochs": 2, "imgsz": 64, "batch": 8, "seed": 5, "close_mosaic": 1, "optimizer": "AdamW"}


def job(runner: Runner, label_task: str = "detect", **changed: Any) -> dict[str, Any]:
    """Draw a data set into the workspace and return a training on it in two ranks."""
    runner.limits = runner.limits.model_copy(update={"max_job_memory_gb": 8.0, "max_workspace_gb": 1.0})
    prepared = runner.workspace.child_dir("prepare")
    draw(prepared, polygons=label_task == "segment", images={"train": 16, "val": 6, "test": 4})
    yaml = write_yaml(prepared, ["train", "val", "test"], ["can", "bottle"])
    yaml.write_text(yaml.read_text().replace(str(prepared), "/job/prepare"))
    return {
        "task": "train_yolo11",
        "model": {"detect": "yolo11n.yaml", "segment": "yolo11n-seg.yaml"}[label_task],
        "label_task": label_task,
        "data": "prepare/data.yaml",
        "options": {**OPTIONS, **changed.pop("options", {})},
        "active_model": None,
        "device": "cpu",
        "ranks": 2,
        "readable": ("prepare",),
        "timeout_s": 300.0,
        **changed,
    }


def epochs_told(runner: Runner) -> list[int]:
    return [entry["epoch"] for said in runner.progress for entry in said.get("history", [])]


def test_two_ranks_train_one_model(walled: Runner) -> None:
    result = walled.child(job(walled)).result
    assert epochs_told(walled) == [1, 2]
    assert (result["epochs"], result["ended_by"]) == (2, "epochs")
    assert set(result["metrics"]["per_class"]) == {"can", "bottle"}
    assert result["metrics"]["per_class"]["can"]["instances"] == 6  # each val image once, not once a rank
    assert result["metrics"]["test"]["per_class"]["can"]["instances"] == 4
    assert {"best.pt", "results.csv", "results.png"} <= set(result["files"])
    assert result["attempts"] == [{"attempt": 1, "epochs": 2, "batch_size": 8, "img_size": 64}]


def test_a_stop_leaves_a_checkpoint_from_which_two_ranks_go_on(walled: Runner) -> None:
    def stop(said: dict[str, Any]) -> None:
        walled.progress.append(said)
        if any(entry["epoch"] == 1 for entry in said.get("history", [])):
            walled.interrupt.request(StopReason.CANCELLED)

    whole = job(walled, "segment", options={"epochs": 3})
    with pytest.raises(JobCancelledError):
        walled.child(whole, on_progress=stop, cancel_grace_s=30.0)
    left = sorted(path.name for path in walled.workspace.child_dir("train").glob("checkpoint-*.tar"))
    assert left == ["checkpoint-1.tar"]
    (walled.workspace.in_dir / "checkpoint.tar").write_bytes(
        (walled.workspace.child_dir("train") / left[0]).read_bytes()
    )
    walled.start_over()
    result = walled.child({**whole, "resume": "in/checkpoint.tar", "attempt": 2}).result
    assert [run["attempt"] for run in result["attempts"]] == [1, 2]
    assert [run["epochs"] for run in result["attempts"]] == [1, 2]
    assert epochs_told(walled)[-2:] == [2, 3]
    assert result["metrics"]["mask"]["mAP50"] is not None


def test_a_rank_out_of_gpu_memory_is_the_jobs_and_leaves_what_was_done(walled: Runner) -> None:
    whole = job(walled, options={"epochs": 3, "nbs": 8})
    with pytest.raises(OutOfGpuMemoryError, match="does not hold batch 8 at 64 px") as caught:
        walled.child(whole, command=(*PYTHON, "-c", SHORT_OF_MEMORY))
    assert caught.value.detail is not None
    assert (caught.value.detail["batch"], caught.value.detail["imgsz"]) == (8, 64)
    assert [path.name for path in walled.workspace.child_dir("train").glob("checkpoint-*.tar")] == [
        "checkpoint-1.tar"
    ]
    assert epochs_told(walled) == [1]
