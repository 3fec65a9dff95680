"""What a worker calls: offers, reports, status and storage."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.auth import AsWorker
from rvmcv_worker.reference.limits import StrictJsonRoute
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.services import InServices, Services

FENCED: dict[int | str, dict[str, Any]] = {
    404: {"model": wire.Refusal, "description": "`unknown_job`: the attempt is fenced"},
    409: {"model": wire.Refusal, "description": "The attempt is fenced, for this reason"},
}

router = APIRouter(prefix="/api/v1/cv", tags=["worker"], route_class=StrictJsonRoute)


@router.get(
    "/job-status",
    response_model=wire.Offers,
    responses={204: {"description": "Nothing came within `wait` seconds"}},
)
async def offer_jobs(
    poll: Annotated[wire.Offer, Query()], request: Request, services: InServices, _who: AsWorker
) -> wire.Offers | Response:
    """Offer jobs to a lane, held up to `wait` seconds. An offer claims nothing."""
    services.queue.polls += 1
    jobs = await _wait_for_jobs(services.queue, poll, request)
    return wire.Offers(jobs=jobs) if jobs else Response(status_code=204)


async def _wait_for_jobs(queue: Queue, poll: wire.Offer, request: Request) -> list[wire.OfferedJob]:
    ends = time.monotonic() + poll.wait
    with queue.wakeup.waiting(poll.job_types.split(",")) as news:
        while True:
            news.clear()
            jobs, due_s = await run_in_threadpool(queue.offer, poll)
            left_s = ends - time.monotonic()
            if jobs or left_s <= 0 or queue.wakeup.closed:
                return jobs
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), left_s if due_s is None else min(left_s, due_s))
            # An offer to a poll that was abandoned would keep the job from others for a while.
            if await request.is_disconnected():
                return []


@router.post(
    "/job-status",
    response_model=wire.Claimed | wire.Directive | wire.Accepted,
    response_model_exclude_none=True,
    responses=FENCED,
)
def report_on_job(
    event: wire.JobEvent, services: InServices, _who: AsWorker
) -> wire.Claimed | wire.Directive | wire.Accepted:
    """Claim a job, report progress, or report its end; repeated, each gets its first answer."""
    if isinstance(event, wire.Claim):
        return _with_url(services.queue.claim(event), event.job_id, services)
    if isinstance(event, wire.ProgressReport):
        return services.queue.progress(event)
    services.models.require(event)
    return services.queue.finish(event)


def _with_url(claimed: wire.Claimed, job_id: str, services: Services) -> wire.Claimed:
    """Add a presigned URL of a checkpoint that came by `job-uploads`: its worker may have no keys.

    Of no other object: a worker names the path.
    """
    resume = claimed.resume
    if resume is None or not (resume.path or "").startswith(f"s3://artifacts/{quote(job_id, safe='')}/"):
        return claimed
    url = services.storage.presigned_get(str(resume.path), services.settings.timing.presigned_s)
    return claimed.model_copy(update={"resume": resume.model_copy(update={"url": url})})


@router.post("/worker-status", response_model=wire.WorkerOrders)
def take_worker_status(status: wire.WorkerStatus, services: InServices, _who: AsWorker) -> wire.WorkerOrders:
    """Take a worker's status, renew the leases that it names, and answer with orders."""
    return services.queue.worker_status(status)


@router.post("/job-uploads", response_model=wire.Uploads, responses=FENCED)
def presign_uploads(wanted: wire.UploadsWanted, services: InServices, _who: AsWorker) -> wire.Uploads:
    """Give presigned PUTs for files of an attempt, under the attempt's own keys."""
    folder = services.queue.folder_of(wanted.job_id, wanted.lease_token)
    valid_s = services.settings.timing.presigned_s
    uploads = {}
    for file in wanted.files:
        key = f"{folder}/{file.name}"
        url = services.storage.presigned_put("artifacts", key, valid_s)
        uploads[file.name] = wire.Upload(url=url, path=f"s3://artifacts/{key}")
    return wire.Uploads(uploads=uploads)
