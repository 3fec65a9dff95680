"""What the unix socket shows and takes of one job: how it stands, its lines, the operator's cancel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from rvmcv_worker.attempt import Services
from rvmcv_worker.events import Event, event
from rvmcv_worker.interrupt import StopReason
from rvmcv_worker.job_logs import JobLine
from rvmcv_worker.routes import JOB, Answer, JobRoutes

#: What RVM-Server is told of a job that the operator has ended.
_BY_OPERATOR = "cancelled on the worker's machine by its operator (rvmcv-worker cancel)"


def routes(services: Services) -> JobRoutes:
    """Return all routes of a job."""
    return {
        ("GET", f"/jobs/{JOB}"): lambda job_id, _query: _standing(services, job_id),
        ("GET", f"/jobs/{JOB}/log"): partial(_log, services),
        ("POST", f"/control/cancel/{JOB}"): lambda job_id, _query: _cancel(services, job_id),
    }


def _cancel(services: Services, job_id: str) -> Answer:
    """Have a running job end as one that RVM-Server cancels."""
    running = {job.job_id: job for job in services.condition.running()}
    if (job := running.get(job_id)) is None:
        end = services.condition.end_of(job_id)
        return _not_here(services, job_id, f"has ended here: {end.status}" if end else "does not run here")
    job.interrupt.request(StopReason.CANCELLED, _BY_OPERATOR)
    if (reason := job.interrupt.reason) is None:  # it came to its end in this moment
        return _not_here(services, job_id, "does not run here any more")
    if reason is not StopReason.CANCELLED:
        return Answer.refusal(
            HTTPStatus.CONFLICT,
            f"{job_id} is ending already, as {reason.value}; if it may come back, cancel it at RVM-Server",
        )
    event(Event.JOB_CANCEL_ASKED, job_id).info("the operator cancels it: it ends, and RVM-Server is told so")
    return Answer.of({"job_id": job_id, "ending": StopReason.CANCELLED.value})


def _standing(services: Services, job_id: str) -> Answer:
    """Say whether the job runs, is over but for its report, or is over, and how it ended here."""
    if any(job.job_id == job_id for job in services.condition.running()):
        return Answer.of({"job_id": job_id, "state": "running", "status": None, "error_code": None})
    end = services.condition.end_of(job_id)
    waiting = services.ledger.waiting()
    reporting = end is not None if waiting is None else job_id in waiting.reports
    if end is None and not reporting:
        return _not_here(services, job_id, "neither runs here nor ended here lately")
    return Answer.of(
        {
            "job_id": job_id,
            "state": "reporting" if reporting else "over",
            "status": end.status if end else None,
            "error_code": end.error_code if end else None,
        }
    )


def _log(services: Services, job_id: str, query: Mapping[str, str]) -> Answer:
    """Return some of the job's last lines, and where to go on."""
    offset = query.get("offset", "0")
    if not (offset.isascii() and offset.isdigit() and len(offset) < 16):
        return Answer.refusal(HTTPStatus.BAD_REQUEST, "offset is a number of lines")
    if (page := services.job_logs.read(job_id, int(offset))) is None:
        return _not_here(services, job_id, "neither runs here nor ended here lately")
    return Answer.of(
        {
            "job_id": job_id,
            "running": page.running,
            "lines": [_line(line) for line in page.lines],
            "next_offset": page.next_offset,
            "lost": page.lost,
        }
    )


def _line(line: JobLine) -> dict[str, Any]:
    at = line.at.isoformat(timespec="milliseconds")
    return {"at": at, "by": line.by, "level": line.level, "text": line.text}


def _not_here(services: Services, job_id: str, what: str) -> Answer:
    running = ", ".join(job.job_id for job in services.condition.running()) or "nothing"
    return Answer.refusal(HTTPStatus.NOT_FOUND, f"{job_id} {what}; running: {running}")
