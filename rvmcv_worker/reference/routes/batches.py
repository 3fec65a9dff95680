"""Batches of images: asked for, watched, cancelled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from rvmcv_worker.reference import inference_wire
from rvmcv_worker.reference.auth import AsAdmin, AsWorkerOrAdmin
from rvmcv_worker.reference.batch_views import page_of_batches, view_of_batch
from rvmcv_worker.reference.batches import MANIFESTS, find_batch
from rvmcv_worker.reference.files import send_object
from rvmcv_worker.reference.inference_tables import Batch
from rvmcv_worker.reference.laravel import invalid, invalid_fields
from rvmcv_worker.reference.limits import FORM, StrictJsonRoute
from rvmcv_worker.reference.routes.forms import form_body
from rvmcv_worker.reference.routes.inference import Page, PerPage
from rvmcv_worker.reference.services import InServices, Services
from rvmcv_worker.reference.storage import CHUNK_BYTES, ObjectMissingError
from rvmcv_worker.reference.wire import Sha256

router = APIRouter(prefix="/api/v1/cv", tags=["inference"], route_class=StrictJsonRoute)

BODY = form_body(
    inference_wire.BatchFields.model_json_schema(),
    "manifest",
    inference_wire.BatchRequest.model_json_schema(),
)


@router.post(
    "/batch-inference", status_code=202, response_model=inference_wire.BatchQueued, openapi_extra=BODY
)
async def infer_batch(
    request: Request, services: InServices, who: AsAdmin
) -> inference_wire.BatchQueued | Response:
    """Queue a batch: `images`, or `manifest_url`, JSON Lines of the same; or a form with a file `manifest`.

    A list of more images than the server's `shard_size` is cut into jobs that several workers share,
    if it came with the request or lies in storage (`s3://`).
    """
    try:
        if request.headers.get("content-type", "").lower().startswith(FORM):
            async with request.form() as form:
                return await run_in_threadpool(_take_form, services, form, who.name)
        try:
            body = await request.json()
        except json.JSONDecodeError as error:
            return invalid({"body": [f"the body is not JSON: {error.msg}"]})
        wanted = inference_wire.BatchRequest.model_validate(body)
        return _queued(await run_in_threadpool(services.batches.add, wanted, who.name))
    except ValidationError as error:
        return invalid_fields(error.errors())


def _take_form(services: Services, form: FormData, asked_by: str) -> inference_wire.BatchQueued | Response:
    file = form.get("manifest")
    if not isinstance(file, UploadFile):
        return invalid({"manifest": ["manifest: a form with a file manifest is needed"]})
    text: dict[str, Any] = {key: value for key, value in form.items() if key != "manifest" and value != ""}
    fields = inference_wire.BatchFields.model_validate(text)
    return _queued(services.batches.add_list(fields, _chunks(file.file), asked_by))


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _queued(batch: Batch) -> inference_wire.BatchQueued:
    return inference_wire.BatchQueued(
        batch_id=batch.batch_id,
        status="queued",
        images_total=batch.images_total,
        shards=batch.shards,
        url=f"/api/v1/cv/batch/{batch.batch_id}",
    )


@router.get("/batch/{batch_id}", response_model=inference_wire.BatchView)
def show_batch(batch_id: str, services: InServices, _who: AsAdmin) -> inference_wire.BatchView:
    """Show a batch: how far its shards are, and once all are over, what came out."""
    with services.queue.look() as turn:
        batch = find_batch(turn, batch_id)
        if batch is None:
            raise HTTPException(404, "Batch not found.")
        return view_of_batch(turn, batch)


@router.delete("/batch/{batch_id}/cancel", response_model=inference_wire.BatchView)
def cancel_batch(batch_id: str, services: InServices, who: AsAdmin) -> inference_wire.BatchView:
    """Cancel every shard: at once while it waits, through its worker while it runs."""
    cancelled = services.batches.cancel(batch_id)
    batch = show_batch(batch_id, services, who)
    if not cancelled and batch.status != "cancelled":
        raise HTTPException(409, f"The batch is {batch.status} already.")
    return batch


@router.get("/batches", response_model=inference_wire.BatchPage)
def list_batches(
    services: InServices, _who: AsAdmin, page: Page = 1, per_page: PerPage = 20
) -> inference_wire.BatchPage:
    """List batches, newest first."""
    with services.queue.look() as turn:
        return page_of_batches(turn, page, per_page)


@router.get("/manifests/{sha256}")
def download_manifest(
    sha256: Sha256, request: Request, services: InServices, _who: AsWorkerOrAdmin
) -> Response:
    """Send the list of a shard's images, JSON Lines."""
    path = services.storage.path_by_hash(MANIFESTS, sha256)
    try:
        return send_object(services.storage, path, sha256, request.headers.get("range"))
    except ObjectMissingError:
        raise HTTPException(404, "Manifest not found.") from None
