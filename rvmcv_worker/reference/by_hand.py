"""What tests, benchmarks and the demo do with a server in their own process, without HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import select

from rvmcv_worker.reference import inference_wire, views, wire
from rvmcv_worker.reference.activation import activate
from rvmcv_worker.reference.alerts import view_of_alert
from rvmcv_worker.reference.batch_views import view_of_batch
from rvmcv_worker.reference.batches import find_batch
from rvmcv_worker.reference.files import received
from rvmcv_worker.reference.inference_logs import view_of_log
from rvmcv_worker.reference.inference_requests import queue_inference
from rvmcv_worker.reference.inference_tables import InferenceLog
from rvmcv_worker.reference.jobs import find_job
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.services import Services
from rvmcv_worker.reference.states import Ability
from rvmcv_worker.reference.storage import Storage
from rvmcv_worker.reference.tables import Alert, ModelVersion, Worker


class ByHand:
    """Half of `ReferenceServer`; the other half starts and stops it."""

    _queue: Queue
    _services: Services
    _storage: Storage

    def queue_training(
        self,
        config: dict[str, Any],
        *,
        job_type: str = "yolo11",
        priority: int = 0,
        job_id: str | None = None,
    ) -> str:
        """Queue a job with exactly this config, bad ones too, and return its id."""
        return self._queue.enqueue(job_type, config, priority=priority, job_id=job_id)

    def queue_inference(
        self, config: dict[str, Any], *, priority: int = 10, job_id: str | None = None
    ) -> str:
        """Queue an `inference` with exactly this config, bad ones too, and return its id."""
        return self._queue.enqueue("inference", config, priority=priority, job_id=job_id)

    def queue_batch(self, config: dict[str, Any], *, priority: int = 0, job_id: str | None = None) -> str:
        """Queue one `batch-inference` with exactly this config, never sharded, and return its id."""
        return self._queue.enqueue("batch-inference", config, priority=priority, job_id=job_id)

    def request_inference(self, **fields: Any) -> str:
        """Queue an inference as ``POST /inference`` does, models resolved, and return its job's id."""
        wanted = inference_wire.InferenceRequest.model_validate(fields)
        return queue_inference(self._queue, self._services.models, wanted, Ability.ADMIN.value)

    def request_batch(self, **fields: Any) -> str:
        """Queue a batch as ``POST /batch-inference`` does, sharded where it is long, and return its id."""
        wanted = inference_wire.BatchRequest.model_validate(fields)
        return self._services.batches.add(wanted, Ability.ADMIN.value).batch_id

    def batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch as ``GET /batch/{batch_id}`` shows it. Raises KeyError."""
        with self._queue.look() as turn:
            found = find_batch(turn, batch_id)
            if found is None:
                raise KeyError(batch_id)
            return view_of_batch(turn, found).model_dump()

    def inference_logs(self) -> list[dict[str, Any]]:
        """Return the rows of ``cv_inference_logs``, oldest first."""
        with self._queue.look() as turn:
            rows = turn.session.scalars(select(InferenceLog).order_by(InferenceLog.id))
            return [view_of_log(row).model_dump() for row in rows]

    def alerts(self) -> list[dict[str, Any]]:
        """Return the rows of ``cv_alerts``, oldest first."""
        with self._queue.look() as turn:
            return [
                view_of_alert(row).model_dump()
                for row in turn.session.scalars(select(Alert).order_by(Alert.id))
            ]

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job as ``GET /job/{job_id}`` shows it. Raises KeyError."""
        with self._queue.look() as turn:
            found = find_job(turn, job_id)
            if found is None:
                raise KeyError(job_id)
            return views.view_of(turn, found).model_dump()

    def wait_for_job(
        self, job_id: str, until: Callable[[dict[str, Any]], bool], timeout_s: float
    ) -> dict[str, Any]:
        """Return the job once `until` holds for it. Raises TimeoutError, which shows the job."""

        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if until(job) else None

        with self._queue.changed:
            found = self._queue.changed.wait_for(look, timeout_s)
        if found is None:
            raise TimeoutError(f"not within {timeout_s} s: {self.job(job_id)}")
        return found

    def wait_until_final(self, job_id: str, timeout_s: float) -> dict[str, Any]:
        """Return the job once it is completed, failed or cancelled. Raises TimeoutError."""

        def is_final() -> bool:
            # Asked after each commit, so it reads one row: a full view would slow the server down.
            with self._queue.look() as turn:
                found = find_job(turn, job_id)
                return found is not None and found.finished_at is not None

        with self._queue.changed:
            ended = self._queue.changed.wait_for(is_final, timeout_s)
        if not ended:
            raise TimeoutError(f"not final within {timeout_s} s: {self.job(job_id)}")
        return self.job(job_id)

    def cancel(self, job_id: str) -> str:
        """Cancel a job and return its status. Raises KeyError."""
        status = self._queue.cancel(job_id)
        if status is None:
            raise KeyError(job_id)
        return status.value

    def models(self) -> list[dict[str, Any]]:
        """Return the rows of ``ai_model_versions``, newest first."""
        with self._queue.look() as turn:
            return [model.model_dump() for model in views.all_models(turn)]

    def workers(self) -> list[dict[str, Any]]:
        """Return the workers as they last showed themselves."""
        with self._queue.look() as turn:
            return [worker.model_dump() for worker in views.all_workers(turn)]

    @property
    def polls(self) -> int:
        """Return how often workers have asked for jobs since the start."""
        return self._queue.polls

    def set_desired_state(self, worker_id: str, desired_state: str) -> None:
        """Tell a worker to run, pause or drain with its next status. Raises for one never seen."""
        with self._queue.turn() as turn:
            turn.session.get_one(Worker, worker_id).desired_state = desired_state

    def add_model(self, file: Path, *, model_name: str, version: str, active: bool = False) -> int:
        """Store a model that is usable at once, as a base model is, and return its id."""
        upload = wire.ModelUpload(model_name=model_name, version=version)
        with file.open("rb") as source, received(source) as (copy, found):
            model_id = self._services.models.add_file(upload, copy, found).id
        if active:
            self.activate(model_id)
        return model_id

    def activate(self, model_id: int) -> None:
        """Make a model the active one of its name."""
        with self._queue.turn() as turn:
            activate(turn, turn.session.get_one(ModelVersion, model_id), by="test")

    def add_dataset(self, file: Path, *, name: str) -> int:
        """Store a data set's archive and return its id."""
        with file.open("rb") as source, received(source) as (copy, found):
            return self._services.datasets.add_file(name, file.name, copy, found).id

    def put_object(self, bucket: str, key: str, file: Path) -> str:
        """Store a file and return its ``s3://`` path; the buckets are datasets, models, artifacts."""
        return self._storage.put_file(bucket, key, file)

    def read_object(self, path: str) -> bytes:
        """Return what lies at an ``s3://`` path."""
        return b"".join(self._storage.read(path))

    def reap(self) -> None:
        """Queue the jobs whose leases ran out; for servers that were made with ``reap=False``."""
        self._queue.reap()
