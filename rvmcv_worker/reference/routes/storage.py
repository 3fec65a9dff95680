"""Data sets and models over HTTP, in the shapes of today's RVM-Server."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, RedirectResponse, Response

from rvmcv_worker.reference import today, wire
from rvmcv_worker.reference.admin_wire import DatasetView
from rvmcv_worker.reference.auth import AsAdmin, AsWorkerOrAdmin
from rvmcv_worker.reference.files import received, send_object
from rvmcv_worker.reference.laravel import invalid, invalid_fields
from rvmcv_worker.reference.refused import FieldRefusedError
from rvmcv_worker.reference.routes.forms import form_body
from rvmcv_worker.reference.services import InServices, Services
from rvmcv_worker.reference.states import Ability
from rvmcv_worker.reference.storage import ObjectMissingError
from rvmcv_worker.reference.tables import Dataset, ModelVersion, TrainingJob

router = APIRouter(prefix="/api/v1/cv", tags=["storage"])

UPLOAD_BODY = form_body(
    {
        "type": "object",
        "required": ["model_name", "version"],
        "properties": {
            "model_name": {"type": "string"},
            "version": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$"},
            "metrics": {"type": "string", "description": "JSON"},
            "training_job_id": {"type": "integer"},
            "lease_token": {"type": "string"},
        },
    },
    "model_file",
    wire.StoredModelUpload.model_json_schema(),
)
DATASET_BODY = form_body(
    {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "images_count": {"type": "integer"}},
    },
    "file",
)


@router.get("/datasets/{dataset_id}", response_model=wire.DatasetShown)
def show_dataset(dataset_id: int, services: InServices, _who: AsWorkerOrAdmin) -> wire.DatasetShown:
    """Tell where a data set's archive can be fetched."""
    dataset = _dataset(services, dataset_id)
    data = wire.DatasetData(
        dataset_id=dataset.id,
        name=dataset.name,
        images_count=dataset.images_count,
        download_url=f"/api/v1/cv/datasets/{dataset.id}/download",
        sha256=dataset.sha256,
        size_bytes=dataset.size_bytes,
    )
    return wire.DatasetShown(data=data)


@router.get("/datasets/{dataset_id}/download")
def download_dataset(
    dataset_id: int, request: Request, services: InServices, _who: AsWorkerOrAdmin
) -> Response:
    """Send a data set's archive; `Range: bytes=N-` resumes."""
    dataset = _dataset(services, dataset_id)
    return _send(services, request, dataset.path, dataset.sha256)


@router.post("/datasets", status_code=201, response_model=DatasetView, openapi_extra=DATASET_BODY)
async def add_dataset(request: Request, services: InServices, _who: AsAdmin) -> DatasetView | Response:
    """Store a data set's archive: a form with `name`, `file` and, optional, `images_count`."""
    async with request.form() as form:
        file, name = form.get("file"), form.get("name")
        if not isinstance(file, UploadFile) or not isinstance(name, str) or not name:
            return invalid({"file": ["a form with name and file is needed"]})
        count = str(form.get("images_count", ""))
        return await run_in_threadpool(
            _store_dataset, services, name, file, int(count) if count.isdecimal() else None
        )


def _store_dataset(services: Services, name: str, file: UploadFile, images_count: int | None) -> DatasetView:
    with received(file.file) as (copy, found):
        dataset = services.datasets.add_file(name, file.filename or "", copy, found, images_count)
    return DatasetView(
        dataset_id=dataset.id, path=dataset.path, sha256=found.sha256, size_bytes=found.size_bytes
    )


@router.get("/download-model/{version_or_hash}")
def download_model(
    version_or_hash: str, request: Request, services: InServices, _who: AsWorkerOrAdmin
) -> Response:
    """Send a model by version or sha256, or redirect to where it lies; `active` is the active yolo11."""
    model = services.models.find(version_or_hash)
    if model is None:
        raise HTTPException(404, "Model not found.")
    if services.settings.redirect_downloads:
        url = services.storage.presigned_get(model.file_path, services.settings.timing.presigned_s)
        return RedirectResponse(url, 302, {"X-SHA256-Hash": model.sha256_hash})
    return _send(services, request, model.file_path, model.sha256_hash)


@router.post("/upload-model", status_code=201, response_model=wire.StoredModel, openapi_extra=UPLOAD_BODY)
async def upload_model(request: Request, services: InServices, who: AsWorkerOrAdmin) -> Response:
    """Store a model: a form with the file, or JSON that names an object in storage.

    Repeated with the same bytes it gets the same answer. A worker's model is inert until a
    completed finish names it; an admin's, without `training_job_id`, is usable at once.
    """
    stopped = today.gate_for_body(services.settings.gates, int(request.headers.get("content-length", 0)))
    if stopped is not None:
        return stopped
    trusted = Ability.ADMIN in who.abilities
    try:
        # Today's server knows forms only: JSON then lacks its file.
        if request.headers["content-type"].startswith("application/json") and not services.settings.as_today:
            stored = wire.StoredModelUpload.model_validate(await request.json())
            _refuse_without_job(stored, trusted=trusted)
            return _stored(await run_in_threadpool(services.models.add_object, stored))
        async with request.form() as form:
            return await run_in_threadpool(_take_form, services, form, trusted)
    except ValidationError as error:
        return invalid_fields(error.errors())


def _take_form(services: Services, form: FormData, trusted: bool) -> Response:
    file = form.get("model_file")
    if not isinstance(file, UploadFile):
        return invalid({"model_file": ["The model file field is required."]})
    try:
        upload = _upload_of(form)
    except ValueError as error:
        if isinstance(error, ValidationError):
            raise
        return invalid({"body": [str(error)]})
    gates = services.settings.gates
    with received(file.file) as (copy, found):
        with copy.open("rb") as start:
            stopped = today.gate_for_file(gates, found.size_bytes, start.read(4))
        if stopped is not None:
            return stopped
        if not services.settings.as_today:
            _refuse_without_job(upload, trusted=trusted)
            return _stored(services.models.add_file(upload, copy, found))
        model = today.upload_model(services.queue, services.storage, upload, copy, found)
    if model is None:
        return today.server_error("SQLSTATE[23000]: Integrity constraint violation: Duplicate entry")
    return _stored(model)


def _upload_of(form: FormData) -> wire.ModelUpload:
    """Return the text fields of a form; raises ValueError, which pydantic's error is too."""
    fields: dict[str, Any] = {key: value for key, value in form.items() if key != "model_file"}
    if "metrics" in fields:
        fields["metrics"] = json.loads(fields["metrics"])
    if "training_job_id" in fields:
        fields["training_job_id"] = int(fields["training_job_id"])
    return wire.ModelUpload.model_validate(fields)


def _refuse_without_job(upload: wire.ModelUpload, *, trusted: bool) -> None:
    if upload.training_job_id is None and not trusted:
        raise FieldRefusedError("training_job_id", "a worker's model belongs to a training job")


def _stored(model: ModelVersion) -> Response:
    data = wire.StoredModelData(
        model_id=model.id,
        sha256_hash=model.sha256_hash,
        file_size_mb=model.file_size_mb,
        file_path=model.file_path,
    )
    return JSONResponse(wire.StoredModel(data=data).model_dump(), 201)


@router.post("/training-complete")
def training_complete(report: wire.TrainingComplete, services: InServices, _who: AsWorkerOrAdmin) -> Response:
    """Take note that a training is over. The finish has decided already; this changes nothing."""
    if services.settings.as_today:
        return today.server_error("SQLSTATE[42S22]: Column not found: 1054 Unknown column 'training_status'")
    with services.queue.look() as turn:
        if turn.session.get(TrainingJob, report.training_job_id) is None:
            raise HTTPException(404, "Training job not found.")
    return JSONResponse({"status": "success"})


def _dataset(services: Services, dataset_id: int) -> Dataset:
    dataset = services.datasets.find(dataset_id)
    if dataset is None:
        raise HTTPException(404, "Dataset not found.")
    return dataset


def _send(services: Services, request: Request, path: str, sha256: str) -> Response:
    try:
        return send_object(services.storage, path, sha256, request.headers.get("range"))
    except ObjectMissingError as error:
        raise HTTPException(404, str(error)) from None
