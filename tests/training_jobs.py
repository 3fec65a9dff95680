"""Trainings small enough for a test, and how one that must not run ends."""

from __future__ import annotations

from rvmcv_worker.reference.server import ReferenceServer
from tests.worker_process import WorkerProcess

SMALL = {"base_model": "yolo11n.yaml", "epochs": 2, "img_size": 64, "batch_size": 8, "seed": 3}
#: The same for `sam2`: random weights, and pictures of 64 px.
SMALL_SAM2 = {"base_model": "scratch", "epochs": 1, "img_size": 64, "batch_size": 2, "objects": 2, "seed": 3}


def first_error(
    server: ReferenceServer, worker: WorkerProcess, config: dict[str, object], job_type: str = "yolo11"
) -> dict[str, str]:
    """Run a job that must fail or be handed back; its error is in the log, and nothing of it is left."""
    small = SMALL_SAM2 if job_type == "sam2" else SMALL
    job_id = server.queue_training({**small, **config}, job_type=job_type)
    job = server.wait_for_job(job_id, lambda job: bool(job["attempts"] and job["attempts"][0]["error"]), 60)
    server.cancel(job_id)
    assert worker.workspace_files() == []
    assert worker.tree() == []
    error: dict[str, str] = job["attempts"][0]["error"]
    assert error["message"][:60] in worker.log()
    return error
