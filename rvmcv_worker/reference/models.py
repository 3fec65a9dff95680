"""Checkpoints: their rows and their bytes."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import case, or_, select

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.activation import EDGE_MODEL, active_model
from rvmcv_worker.reference.jobs import find_job
from rvmcv_worker.reference.leases import hold
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.refused import FieldRefusedError
from rvmcv_worker.reference.states import Reason
from rvmcv_worker.reference.storage import ObjectMissingError, Storage, StoredObject
from rvmcv_worker.reference.tables import ModelVersion, TrainingJob
from rvmcv_worker.reference.turn import FencedError, Turn

#: Asked for in the place of a version; no upload may be named so.
ACTIVE = "active"


class ModelShelf:
    """Stores models, repeatably, and finds them by version or hash."""

    def __init__(self, queue: Queue, storage: Storage) -> None:
        self._queue = queue
        self._storage = storage

    def add_file(self, upload: wire.ModelUpload, file: Path, found: StoredObject) -> ModelVersion:
        """Store a file and its row. Without a training job the model is usable at once."""
        with self._queue.turn() as turn:
            folder = self._folder(turn, upload)
        path = self._storage.put_file("models", f"{folder}/{upload.model_name}_{upload.version}.pt", file)
        return self._add_row(upload, path, found)

    def add_object(self, upload: wire.StoredModelUpload) -> ModelVersion:
        """Add a row for an object that lies in storage, after reading it."""
        try:
            found = self._storage.examine(upload.file_path)
        except ObjectMissingError as error:
            raise FieldRefusedError("file_path", str(error)) from None
        if found.sha256 != upload.sha256_hash:
            message = f"{upload.file_path} has sha256 {found.sha256}, not {upload.sha256_hash}"
            raise FieldRefusedError("sha256_hash", message)
        return self._add_row(upload, upload.file_path, found)

    def find(self, version_or_hash: str) -> ModelVersion | None:
        """Return the newest model of this hash, or the newest usable one of this version or file name.

        The file of version `v3` of `yolo11` is `yolo11_v3.pt`. `ACTIVE` is the active detector.
        """
        if version_or_hash == ACTIVE:
            with self._queue.look() as turn:
                return active_model(turn, EDGE_MODEL)
        plain = version_or_hash.removesuffix(".pt")
        file_name = ModelVersion.model_name + "_" + ModelVersion.version
        named = (
            or_(ModelVersion.version.in_((plain, f"{plain}.pt")), file_name == plain) & ModelVersion.usable
        )
        exact = case((ModelVersion.version == version_or_hash, 0), else_=1)
        query = (
            select(ModelVersion)
            .where(or_(ModelVersion.sha256_hash == version_or_hash.lower(), named))
            .order_by(exact, ModelVersion.id.desc())
        )
        with self._queue.look() as turn:
            return turn.session.scalars(query).first()

    def require(self, report: wire.Finish) -> None:
        """See to it that the model which a completed finish names is here, by row and by bytes."""
        result = report.result or {}
        if report.status != "completed" or "sha256_hash" not in result:
            return
        with self._queue.look() as turn:
            job = find_job(turn, report.job_id)
            if not isinstance(job, TrainingJob):
                return
            named = (ModelVersion.training_job_id == job.id) & (
                ModelVersion.sha256_hash == str(result["sha256_hash"])
            )
            if turn.session.scalars(select(ModelVersion.id).where(named)).first() is not None:
                return
        fields = ("model_name", "version", "metrics", "sha256_hash")
        try:
            upload = wire.StoredModelUpload.model_validate(
                {
                    **{key: result[key] for key in fields if key in result},
                    "file_path": result.get("result_model_path"),
                    "training_job_id": job.id,
                    "lease_token": report.lease_token,
                }
            )
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            message = f"names a model that was not uploaded, and cannot be read from storage: {where}"
            raise FieldRefusedError("result", message) from None
        self.add_object(upload)

    def _folder(self, turn: Turn, upload: wire.ModelUpload) -> str:
        """Return the folder of the attempt that uploads; raises `FencedError` when its lease is lost."""
        if upload.version == ACTIVE:
            raise FieldRefusedError("version", f"{ACTIVE} names the active model, so it can name no other")
        if upload.training_job_id is None:
            return "uploads"
        job = turn.session.get(TrainingJob, upload.training_job_id)
        if job is None:
            raise FencedError(Reason.UNKNOWN_JOB, "no training job has this id")
        if upload.lease_token is None:
            raise FieldRefusedError("lease_token", "a model of a training needs its lease_token")
        # What is uploaded is inert, so an attempt may upload for as long as it may finish.
        _job, attempt = hold(turn, job.job_id, upload.lease_token, to_finish=True)
        folder = f"{job.job_id}/attempt-{attempt.attempt}"
        if isinstance(upload, wire.StoredModelUpload) and f"/{folder}/" not in upload.file_path:
            raise FieldRefusedError("file_path", f"must lie in the attempt's own folder {folder}")
        if not upload.version.endswith(f"-a{attempt.attempt}"):
            raise FieldRefusedError("version", f"must end in -a{attempt.attempt}: this attempt's number")
        return folder

    def _add_row(self, upload: wire.ModelUpload, path: str, found: StoredObject) -> ModelVersion:
        with self._queue.turn() as turn:
            self._folder(turn, upload)
            same = (ModelVersion.model_name == upload.model_name) & (ModelVersion.version == upload.version)
            known = turn.session.scalar(select(ModelVersion).where(same))
            if known is not None:
                if known.sha256_hash != found.sha256:
                    raise FieldRefusedError("version", "is taken by other bytes: a version never changes")
                return known
            model = ModelVersion(
                model_name=upload.model_name,
                version=upload.version,
                file_path=path,
                sha256_hash=found.sha256,
                size_bytes=found.size_bytes,
                file_size_mb=round(found.size_bytes / 2**20, 2),
                metrics=upload.metrics,
                training_job_id=upload.training_job_id,
                usable=upload.training_job_id is None,
                is_active=False,
                created_at=turn.now,
            )
            turn.session.add(model)
            turn.session.flush()
            return model
