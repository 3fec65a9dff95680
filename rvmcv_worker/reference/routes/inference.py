"""Single inferences: asked for, waited for, logged."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from rvmcv_worker.reference import inference_wire, views
from rvmcv_worker.reference.auth import AsAdmin, AsEdgeOrAdmin, AsWorkerOrAdmin
from rvmcv_worker.reference.files import received, send_object
from rvmcv_worker.reference.inference_logs import page_of_logs
from rvmcv_worker.reference.inference_requests import queue_inference
from rvmcv_worker.reference.inference_tables import InferenceJob
from rvmcv_worker.reference.jobs import find_job, last_hand_back, queue_position
from rvmcv_worker.reference.laravel import invalid, invalid_fields
from rvmcv_worker.reference.limits import StrictJsonRoute
from rvmcv_worker.reference.routes.forms import form_body
from rvmcv_worker.reference.services import InServices, Services
from rvmcv_worker.reference.states import FINAL, Ability, JobStatus
from rvmcv_worker.reference.storage import ObjectMissingError
from rvmcv_worker.reference.tokens import Caller
from rvmcv_worker.reference.wire import Sha256

#: Folder of uploaded images in storage.
IMAGES = "images"
NOT_YET: dict[int | str, dict[str, Any]] = {
    202: {"model": inference_wire.InferenceAnswer, "description": "It is not over: look again at `url`"}
}
Wait = Annotated[inference_wire.Wait, Query()]
Page = Annotated[int, Query(ge=1)]
PerPage = Annotated[int, Query(ge=1, le=200)]

router = APIRouter(prefix="/api/v1/cv", tags=["inference"], route_class=StrictJsonRoute)


@router.post("/inference", response_model=inference_wire.InferenceAnswer, responses=NOT_YET)
async def infer(
    wanted: inference_wire.InferenceRequest,
    response: Response,
    services: InServices,
    who: AsEdgeOrAdmin,
    wait: Wait = 0,
) -> inference_wire.InferenceAnswer:
    """Queue an inference; with `wait`, answer with its result if that comes in time.

    200 is the result, or why there is none (`status`); 202 means that it is not over yet. A fraud check
    goes before all else, the sooner the less sure the machine was of what it saw.
    """
    job_id = await run_in_threadpool(queue_inference, services.queue, services.models, wanted, who.name)
    return await _answer(services, job_id, who, wait, response)


@router.post(
    "/playground-inference",
    response_model=inference_wire.InferenceAnswer,
    responses=NOT_YET,
    openapi_extra=form_body(inference_wire.PlaygroundFields.model_json_schema(), "image"),
)
async def infer_in_playground(
    request: Request, response: Response, services: InServices, who: AsAdmin, wait: Wait = 0
) -> inference_wire.InferenceAnswer | Response:
    """Queue an inference on an uploaded image: a form with `image` and the options of `inference`."""
    async with request.form() as form:
        file = form.get("image")
        if not isinstance(file, UploadFile) or not file.size:
            return invalid({"image": ["image: a form with an image is needed"]})
        try:
            fields = {key: value for key, value in form.items() if key != "image" and value != ""}
            options = inference_wire.PlaygroundFields.model_validate(fields)
        except ValidationError as error:
            return invalid_fields(error.errors())
        job_id = await run_in_threadpool(_queue_upload, services, file, options, who.name)
    return await _answer(services, job_id, who, wait, response)


def _queue_upload(
    services: Services, file: UploadFile, options: inference_wire.PlaygroundFields, asked_by: str
) -> str:
    with received(file.file) as (copy, _found):
        sha256 = services.storage.put_by_hash(IMAGES, copy)
    wanted = inference_wire.InferenceRequest(
        **options.model_dump(),
        # By this server, not by its path in storage: a worker may have no keys.
        image_url=f"/api/v1/cv/images/{sha256}",
        image_sha256=sha256,
        purpose="playground",
    )
    return queue_inference(services.queue, services.models, wanted, asked_by)


@router.get("/inference/{job_id}", response_model=inference_wire.InferenceAnswer, responses=NOT_YET)
async def show_inference(
    job_id: str, response: Response, services: InServices, who: AsEdgeOrAdmin, wait: Wait = 0
) -> inference_wire.InferenceAnswer:
    """Look at an inference again; RVM-Edge at those it asked for itself. 202 while it is not over."""
    return await _answer(services, job_id, who, wait, response)


async def _answer(
    services: Services, job_id: str, who: Caller, wait_s: float, response: Response
) -> inference_wire.InferenceAnswer:
    row_id = await run_in_threadpool(_row_of, services, job_id, who)
    await services.held.wait(row_id, job_id, wait_s)
    answer = await run_in_threadpool(_look, services, job_id)
    response.status_code = 200 if answer.status in FINAL else 202
    return answer


def _row_of(services: Services, job_id: str, who: Caller) -> int:
    with services.queue.look() as turn:
        job = find_job(turn, job_id)
    own = isinstance(job, InferenceJob) and job.asked_by == who.name
    if not isinstance(job, InferenceJob) or not (own or Ability.ADMIN in who.abilities):
        raise HTTPException(404, "Inference not found.")
    return job.id


def _look(services: Services, job_id: str) -> inference_wire.InferenceAnswer:
    with services.queue.look() as turn:
        job = find_job(turn, job_id)
        assert job is not None  # jobs are never deleted
        return inference_wire.InferenceAnswer(
            job_id=job.job_id,
            status=job.status,
            priority=job.priority,
            queue_position=queue_position(turn, job) if job.status == JobStatus.QUEUED.value else None,
            url=f"/api/v1/cv/inference/{job.job_id}",
            result=job.result,
            error=job.error,
            handed_back=last_hand_back(turn, job),
        )


@router.get("/images/{sha256}")
def download_image(sha256: Sha256, request: Request, services: InServices, _who: AsWorkerOrAdmin) -> Response:
    """Send an image that was uploaded to the playground."""
    path = services.storage.path_by_hash(IMAGES, sha256)
    try:
        return send_object(services.storage, path, sha256, request.headers.get("range"))
    except ObjectMissingError:
        raise HTTPException(404, "Image not found.") from None


@router.get("/inference-jobs", response_model=views.JobPage)
def list_inference_jobs(
    services: InServices,
    _who: AsAdmin,
    page: Page = 1,
    per_page: PerPage = 20,
    status: JobStatus | None = None,
) -> views.JobPage:
    """List inferences and batches' shards, newest first."""
    with services.queue.look() as turn:
        return views.page_of_jobs(turn, InferenceJob, status, page, per_page)


@router.get("/inference-logs", response_model=inference_wire.LogPage)
def list_inference_logs(
    services: InServices,
    _who: AsAdmin,
    page: Page = 1,
    per_page: PerPage = 20,
    purpose: inference_wire.Purpose | None = None,
) -> inference_wire.LogPage:
    """List completed inferences and batches, newest first: `cv_inference_logs`."""
    with services.queue.look() as turn:
        return page_of_logs(turn, purpose, page, per_page)
