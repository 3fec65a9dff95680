"""What a person calls: the plan's API of RVM-CV, and what it takes to run a server."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from sqlalchemy import func, select
from starlette.responses import Response

from rvmcv_worker.reference import admin_wire, views
from rvmcv_worker.reference.activation import activate
from rvmcv_worker.reference.auth import AsAdmin, AsAnyone
from rvmcv_worker.reference.jobs import JOB_TABLES, enqueue, find_job, queue_position
from rvmcv_worker.reference.laravel import invalid
from rvmcv_worker.reference.services import InServices
from rvmcv_worker.reference.states import Ability, JobStatus
from rvmcv_worker.reference.tables import ModelVersion, TrainingJob, Worker
from rvmcv_worker.reference.turn import Turn

router = APIRouter(prefix="/api/v1/cv", tags=["admin"])


@router.post("/train", status_code=201, response_model=admin_wire.TrainQueued)
def train(
    wanted: admin_wire.TrainRequest, services: InServices, _who: AsAdmin
) -> admin_wire.TrainQueued | Response:
    """Queue a training. `dataset_id` or `dataset_url` names the data; `options` may hold more."""
    fields = wanted.model_dump(exclude={"job_type", "priority", "options"}, exclude_none=True)
    twice = sorted(set(fields) & set(wanted.options))
    if twice:
        return invalid({f"options.{twice[0]}": [f"{twice[0]} is given twice: as a field and in options"]})
    if (wanted.dataset_id is None) == (wanted.dataset_url is None):
        return invalid({"dataset_id": ["either dataset_id or dataset_url is needed"]})
    if wanted.dataset_id is not None:
        dataset = services.datasets.find(wanted.dataset_id)
        if dataset is None:
            return invalid({"dataset_id": [f"there is no data set {wanted.dataset_id}"]})
        fields.setdefault("dataset_sha256", dataset.sha256)
    base = services.models.find(wanted.base_model) if wanted.base_model else None
    if base is not None:
        fields.setdefault("base_model_sha256", base.sha256_hash)
    with services.queue.turn() as turn:
        job = enqueue(turn, wanted.job_type, {**fields, **wanted.options}, priority=wanted.priority)
        return admin_wire.TrainQueued(
            job_id=job.job_id,
            status="queued",
            estimated_duration=_usual_duration_s(turn, wanted.job_type),
            queue_position=queue_position(turn, job),
        )


def _usual_duration_s(turn: Turn, job_type: str) -> float | None:
    duration = func.avg(TrainingJob.finished_at - TrainingJob.started_at)
    mean_s: float | None = turn.session.scalar(
        select(duration).where(
            TrainingJob.job_type == job_type, TrainingJob.status == JobStatus.COMPLETED.value
        )
    )
    return None if mean_s is None else round(mean_s, 1)


# An id that is not a plain name is still an id: bad jobs are looked up as well.
@router.get("/job/{job_id:path}", response_model=views.JobView)
def show_job(job_id: str, services: InServices, _who: AsAdmin) -> views.JobView:
    """Show a job: status, progress, result, error, timings, and every attempt."""
    with services.queue.look() as turn:
        job = find_job(turn, job_id)
        if job is None:
            raise HTTPException(404, "Job not found.")
        return views.view_of(turn, job)


@router.delete("/job/{job_id:path}/cancel", response_model=admin_wire.JobCancelled)
def cancel_job(job_id: str, services: InServices, _who: AsAdmin) -> admin_wire.JobCancelled:
    """Cancel a job: at once while it waits, through its worker while it runs."""
    status = services.queue.cancel(job_id)
    if status is None:
        raise HTTPException(404, "Job not found.")
    if status in (JobStatus.COMPLETED, JobStatus.FAILED):
        raise HTTPException(409, f"The job is {status.value} already.")
    return admin_wire.JobCancelled(job_id=job_id, status=status.value)


@router.get("/training-jobs", response_model=views.JobPage)
def list_training_jobs(
    services: InServices,
    _who: AsAdmin,
    page: Annotated[int, Query(ge=1)] = 1,
    per_page: Annotated[int, Query(ge=1, le=200)] = 20,
    status: JobStatus | None = None,
) -> views.JobPage:
    """List trainings, newest first."""
    with services.queue.look() as turn:
        return views.page_of_jobs(turn, TrainingJob, status, page, per_page)


@router.get("/models", response_model=list[views.ModelView])
def list_models(services: InServices, _who: AsAdmin) -> list[views.ModelView]:
    """List models, newest first; those that are not `usable` wait for their job's finish."""
    with services.queue.look() as turn:
        return views.all_models(turn)


@router.post("/models/{model_id}/activate", response_model=views.ModelView)
def activate_model(model_id: int, services: InServices, who: AsAdmin) -> views.ModelView:
    """Make a model the active one of its name. A roll-back activates the one before."""
    with services.queue.turn() as turn:
        model = turn.session.get(ModelVersion, model_id)
        if model is None:
            raise HTTPException(404, "Model not found.")
        if not model.usable:
            raise HTTPException(409, "The training that made this model has not completed.")
        activate(turn, model, by=who.name)
        turn.session.flush()
        return views.model_view(model)


@router.post("/tokens", status_code=201, response_model=admin_wire.TokenMade)
def make_token(wanted: admin_wire.TokenRequest, services: InServices, _who: AsAdmin) -> admin_wire.TokenMade:
    """Make a token; it is shown this once."""
    abilities = [Ability(name) for name in wanted.abilities]
    return admin_wire.TokenMade(name=wanted.name, token=services.tokens.make(wanted.name, abilities))


@router.delete("/tokens/{name}")
def revoke_token(name: str, services: InServices, _who: AsAdmin) -> dict[str, int]:
    """Revoke every token of a name."""
    revoked = services.tokens.revoke(name)
    if not revoked:
        raise HTTPException(404, "Token not found.")
    return {"revoked": revoked}


@router.get("/workers", response_model=list[views.WorkerView])
def list_workers(services: InServices, _who: AsAdmin) -> list[views.WorkerView]:
    """List the workers as they last showed themselves."""
    with services.queue.look() as turn:
        return views.all_workers(turn)


@router.post("/workers/{worker_id}/desired-state", response_model=views.WorkerView)
def wish_of_worker(
    worker_id: str, wish: admin_wire.WorkerWish, services: InServices, _who: AsAdmin
) -> views.WorkerView:
    """Let a worker run, pause (claim nothing) or drain (hand back too); told with its next status."""
    with services.queue.turn() as turn:
        worker = turn.session.get(Worker, worker_id)
        if worker is None:
            raise HTTPException(404, "Worker not found.")
        worker.desired_state = wish.desired_state
        return views.worker_view(worker, turn.now)


@router.get("/health")
def health(services: InServices, _who: AsAnyone) -> dict[str, Any]:
    """Tell whether the server works, and how long ago each worker was seen."""
    with services.queue.look() as turn:
        seen = {worker.worker_id: worker.seen_s_ago for worker in views.all_workers(turn)}
    return {"status": "healthy", "workers_seen_s_ago": seen}


@router.get("/metrics")
def metrics(services: InServices, _who: AsAdmin) -> dict[str, Any]:
    """Count jobs by type and status, as JSON, with each worker's last status, and requests held now."""
    counts: dict[str, dict[str, int]] = {}
    with services.queue.look() as turn:
        for table in JOB_TABLES:
            grouped = select(table.job_type, table.status, func.count()).group_by(
                table.job_type, table.status
            )
            for job_type, status, count in turn.session.execute(grouped):
                counts.setdefault(job_type, {})[status] = count
        workers = [worker.model_dump() for worker in views.all_workers(turn)]
    return {"jobs": counts, "workers": workers, "held_answers": services.held.held}
