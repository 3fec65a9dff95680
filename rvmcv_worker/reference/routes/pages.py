"""Pages for people: jobs, batches, inferences, alerts; and one page per job and batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.templating import Jinja2Templates
from markupsafe import Markup
from sqlalchemy import select
from starlette.responses import RedirectResponse, Response

from rvmcv_worker.reference import views
from rvmcv_worker.reference.alerts import page_of_alerts
from rvmcv_worker.reference.auth import AsPageReader
from rvmcv_worker.reference.batch_views import page_of_batches, view_of_batch
from rvmcv_worker.reference.batches import find_batch
from rvmcv_worker.reference.inference_logs import page_of_logs
from rvmcv_worker.reference.jobs import JOB_TABLES, find_job, last_hand_back
from rvmcv_worker.reference.services import InServices

JOBS_SHOWN = 200
#: So many calls of a replaced daemon are more than requests that came late: two run under one name.
TWINS = 3
#: Nothing on these pages may run: what they show was written by strangers.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

# Jinja2Templates escapes everything that goes into an .html file.
_templates = Jinja2Templates(Path(__file__).parent.parent / "pages")
_templates.env.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)


def _moment(time: str | None) -> str:
    """Return an RFC 3339 time in one piece, to the second."""
    if time is None:
        return ""
    return Markup('<time datetime="{}">{} {}Z</time>').format(time, time[:10], time[11:19])


def _figure(value: Any, digits: int) -> str:
    """Return a number that a worker told as people read it, and what is none as it is."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else str(value)


_templates.env.filters["moment"] = _moment
_templates.env.filters["figure"] = _figure

router = APIRouter(include_in_schema=False)


@router.get("/")
def home() -> Response:
    """Go to the list of jobs."""
    return RedirectResponse("/jobs")


@router.get("/jobs")
def jobs_page(request: Request, services: InServices, _who: AsPageReader) -> Response:
    """List jobs of every type, newest first."""
    with services.queue.look() as turn:
        found = [
            job
            for table in JOB_TABLES
            for job in turn.session.scalars(select(table).order_by(table.id.desc()).limit(JOBS_SHOWN))
        ]
        twins = [each for each in views.all_workers(turn) if each.alternations >= TWINS]
        handed_back = {job.job_id: last_hand_back(turn, job) for job in found}
    found.sort(key=lambda job: job.created_at, reverse=True)
    shown = {"jobs": [views.summary_of(job) for job in found], "twins": twins, "handed_back": handed_back}
    return _page(request, "jobs.html", shown)


# The id is in the query, since it may hold what browsers take out of a path.
@router.get("/job")
def job_page(request: Request, job_id: str, services: InServices, _who: AsPageReader) -> Response:
    """Show one job."""
    with services.queue.look() as turn:
        job = find_job(turn, job_id)
        if job is None:
            raise HTTPException(404, "Job not found.")
        return _page(request, "job.html", {"job": views.view_of(turn, job)})


@router.get("/batches")
def batches_page(request: Request, services: InServices, _who: AsPageReader) -> Response:
    """List batches, newest first."""
    with services.queue.look() as turn:
        page = page_of_batches(turn, 1, JOBS_SHOWN)
    return _page(request, "batches.html", {"batches": page.data})


@router.get("/batch")
def batch_page(request: Request, batch_id: str, services: InServices, _who: AsPageReader) -> Response:
    """Show one batch."""
    with services.queue.look() as turn:
        batch = find_batch(turn, batch_id)
        if batch is None:
            raise HTTPException(404, "Batch not found.")
        return _page(request, "batch.html", {"batch": view_of_batch(turn, batch)})


@router.get("/logs")
def logs_page(request: Request, services: InServices, _who: AsPageReader) -> Response:
    """List completed inferences and batches, newest first."""
    with services.queue.look() as turn:
        page = page_of_logs(turn, None, 1, JOBS_SHOWN)
    return _page(request, "logs.html", {"logs": page.data})


@router.get("/alerts")
def alerts_page(request: Request, services: InServices, _who: AsPageReader) -> Response:
    """List alerts, newest first."""
    with services.queue.look() as turn:
        page = page_of_alerts(turn, kind=None, acknowledged=None, page=1, per_page=JOBS_SHOWN)
        waiting = page_of_alerts(turn, kind=None, acknowledged=False, page=1, per_page=1).total
    return _page(request, "alerts.html", {"alerts": page.data, "waiting": waiting})


def _page(request: Request, name: str, context: dict[str, Any]) -> Response:
    return _templates.TemplateResponse(request, name, context, headers=HEADERS)
