"""The registry of job types: a new one is one file here and one in `compute/`."""

from __future__ import annotations

from rvmcv_worker.job_type import JobType
from rvmcv_worker.jobs.batch_inference import BatchInference
from rvmcv_worker.jobs.inference import Inference
from rvmcv_worker.jobs.sam2 import Sam2
from rvmcv_worker.jobs.stub import Stub
from rvmcv_worker.jobs.yolo11 import Yolo11

#: Every job type that this worker can run, by its name in the protocol.
JOB_TYPES: dict[str, JobType] = {
    job_type.name: job_type for job_type in (Yolo11(), Sam2(), Inference(), BatchInference(), Stub())
}
