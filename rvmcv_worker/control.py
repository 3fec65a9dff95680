"""What a running worker shows and takes on its unix socket: the routes of `health.py`."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from functools import partial
from http import HTTPStatus
from typing import Any

from rvmcv_worker import __version__, readiness
from rvmcv_worker.attempt import Services
from rvmcv_worker.events import Event, event
from rvmcv_worker.heartbeat import Heartbeat, gpu_statuses
from rvmcv_worker.metrics import Metrics
from rvmcv_worker.operator_wish import OperatorWish
from rvmcv_worker.protocol import DesiredState, progress_of
from rvmcv_worker.routes import Answer, Routes
from rvmcv_worker.state import JobEnd, RunningJob

#: What is asked for by `POST /control/<name>`.
_WISHES = {"drain": DesiredState.DRAIN, "pause": DesiredState.PAUSE, "resume": DesiredState.RUN}
#: What was used in the last so many seconds stays where a claim is on its way.
_CLAIMED_S = 60.0
#: What of a job's progress is shown.
_PROGRESS = {"phase", "fraction", "epoch", "epochs", "images_done", "images_total", "eta_s", "message"}


def routes(services: Services, heartbeat: Heartbeat, wish: OperatorWish, metrics: Metrics) -> Routes:
    """Return all routes."""
    return {
        ("GET", "/healthz"): lambda: readiness.healthz(services.condition, services.tick),
        ("GET", "/readyz"): lambda: readiness.readyz(services.condition, heartbeat.claims()),
        ("GET", "/status"): lambda: Answer.of(status(services, heartbeat)),
        ("GET", "/metrics"): metrics.answer,
        ("POST", "/control/wipe-store"): lambda: _wipe_store(services),
        **{
            ("POST", f"/control/{name}"): partial(_follow, services, wish, name, desired)
            for name, desired in _WISHES.items()
        },
    }


def status(services: Services, heartbeat: Heartbeat) -> dict[str, Any]:
    """Return how the worker is at this moment; no secret is in it."""
    condition = services.condition
    running = condition.running()
    totals = condition.totals(outbox=0)
    known = {job.job_id for job in running}
    waiting = services.ledger.waiting()
    return {
        "worker_id": services.settings.worker.id,
        "instance_id": services.instance_id,
        "version": __version__,
        "state": condition.state(),
        "reasons": condition.reasons(),
        "claims": heartbeat.claims().model_dump(),
        "desired": _desired(services),
        "stopping": condition.stopping.is_set(),
        "uptime_s": heartbeat.uptime_s(),
        "server": services.settings.server.url,
        "sandbox": services.sandbox.name,
        "engines": [engine.model_dump() for engine in services.engines.status()],
        "running": [_running(job) for job in running],
        # Claims on their way, and those that the daemon before left; null while the ledger does not answer.
        "claiming": None if waiting is None else len(waiting.claims - known),
        "outbox": None if waiting is None else len(waiting.reports),
        "gpus": [gpu.model_dump() for gpu in gpu_statuses(services.gpus)],
        "no_gpus": services.gpus.reason or None,
        "disk": _disk(services),
        "jobs": totals.model_dump(exclude={"running", "outbox"}),
        "last_ends": [_end(end) for end in condition.last_ends()],
    }


def _disk(services: Services) -> dict[str, float | None]:
    """Return what was seen of the disk last: one that hangs must not have this hang with it."""
    look, limits = services.disk_room.last, services.settings.limits
    return {
        "free_gb": _gb(look.free_bytes),
        "floor_gb": limits.disk_floor_gb,
        "workspace_gb": _gb(look.workspace_bytes),
        "model_store_gb": _gb(look.model_store_bytes),
        "looked_ago_s": round(look.age_s, 1),
    }


def _gb(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / 1e9, 3)


def _follow(services: Services, wish: OperatorWish, name: str, desired: DesiredState) -> Answer:
    try:
        wish.set(desired, by=f"asked for {name} on the socket")
    except OSError as error:
        return Answer.refusal(
            HTTPStatus.INSUFFICIENT_STORAGE,
            f"{name}: followed, but not written down ({error.strerror}): a restart forgets it",
        )
    return Answer.of({"state": services.condition.state(), "desired": _desired(services)})


def _wipe_store(services: Services) -> Answer:
    """Empty the model store but for what a running job may have asked for."""
    condition, store = services.condition, services.model_store
    now_s = time.monotonic()
    spared_s = max((now_s - job.started_s for job in condition.running()), default=0.0)
    if condition.held():  # claims on their way among them: their jobs have begun as good as now
        spared_s = max(spared_s, _CLAIMED_S)
    try:
        services.engines.drop_unused()
        removed = store.empty(spared_s=spared_s)
        kept_bytes = store.used_bytes()
    except OSError as error:
        return Answer.refusal(
            HTTPStatus.INTERNAL_SERVER_ERROR, f"the model store could not be emptied: {error}; see the disk"
        )
    event(Event.STORE_TRIMMED).info("model store: emptied by the operator's wish, {} models removed", removed)
    return Answer.of({"removed": removed, "model_store_gb": _gb(kept_bytes)})


def _desired(services: Services) -> dict[str, str]:
    wishes = services.condition.wishes()
    return {"server": wishes.server, "operator": wishes.operator, "holds": wishes.holds}


def _running(job: RunningJob) -> dict[str, Any]:
    running_s = time.monotonic() - job.started_s
    return {
        "job_id": job.job_id,
        "job_type": job.job_type,
        "lane": job.lane.value,
        "attempt": job.attempt,
        "running_s": round(running_s, 1),
        "ending": job.interrupt.reason.value if job.interrupt.reason else None,
        # A copy: the attempt goes on meanwhile, and some of it is what a child said.
        **progress_of(dict(job.progress)).model_dump(include=_PROGRESS),
    }


def _end(end: JobEnd) -> dict[str, Any]:
    return {
        "job_id": end.job_id,
        "job_type": end.job_type,
        "attempt": end.attempt,
        "status": end.status,
        "error_code": end.error_code,
        "ended_at": end.ended_at.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "ended_ago_s": round((datetime.now(timezone.utc) - end.ended_at).total_seconds(), 1),
        "took_s": round(end.took_s, 3),
    }
