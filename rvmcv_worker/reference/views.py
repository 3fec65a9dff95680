"""What is shown of jobs, models and workers."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import func, select

from rvmcv_worker.reference.gpus import waits_for
from rvmcv_worker.reference.jobs import attempts_of, queue_position
from rvmcv_worker.reference.mask_scores import MaskScores, mask_scores
from rvmcv_worker.reference.states import JobStatus
from rvmcv_worker.reference.tables import Attempt, Job, ModelVersion, Worker
from rvmcv_worker.reference.times import rfc3339, rfc3339_or_none
from rvmcv_worker.reference.turn import Turn
from rvmcv_worker.reference.wire import Response


class AttemptView(Response):
    """One accepted claim of a job."""

    attempt: int
    worker_id: str
    instance_id: str
    claimed_at: str
    ended_at: str | None
    #: The status of its finish, or why the job was taken from it; null while it runs.
    ended_as: str | None
    #: Why it no longer holds the job, though it may still report.
    lapsed_as: str | None
    counts: bool
    error: dict[str, Any] | None
    timings: dict[str, Any] | None


class JobSummary(Response):
    """A job in a list."""

    job_id: str
    id: int
    job_type: str
    status: Literal["queued", "processing", "cancelling", "completed", "failed", "cancelled"]
    priority: int
    attempt: int
    fraction: float | None
    phase: str | None
    error_code: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None


class JobView(JobSummary):
    """Everything that is known of a job."""

    queue_position: int | None
    #: Why no worker is offered it, though it is queued, where the workers are to blame.
    waits_for: str | None
    config: dict[str, Any]
    progress: dict[str, Any] | None
    history: list[Any]
    checkpoint: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    timings: dict[str, Any] | None
    activation: dict[str, Any] | None
    #: Of a fine-tuning of SAM2, once something was measured.
    mask_scores: MaskScores | None
    attempts: list[AttemptView]


class JobPage(Response):
    """One page of jobs, newest first."""

    page: int
    per_page: int
    total: int
    data: list[JobSummary]


class ModelView(Response):
    """A row of ``ai_model_versions``."""

    id: int
    model_name: str
    version: str
    sha256_hash: str
    file_size_mb: float
    file_path: str
    metrics: dict[str, Any] | None
    training_job_id: int | None
    usable: bool
    is_active: bool
    created_at: str


class WorkerView(Response):
    """A worker as it last showed itself."""

    worker_id: str
    instance_id: str
    seen_at: str
    seen_s_ago: float
    desired_state: str
    #: Above a few: two daemons run under this name.
    alternations: int
    status: dict[str, Any] | None


def summary_of(job: Job) -> JobSummary:
    """Return a job as lists show it."""
    progress = job.progress or {}
    return JobSummary(
        job_id=job.job_id,
        id=job.id,
        job_type=job.job_type,
        status=job.status,
        priority=job.priority,
        attempt=job.attempt,
        fraction=progress.get("fraction"),
        phase=progress.get("phase"),
        error_code=(job.error or {}).get("code"),
        created_at=rfc3339(job.created_at),
        started_at=rfc3339_or_none(job.started_at),
        finished_at=rfc3339_or_none(job.finished_at),
    )


def page_of_jobs(turn: Turn, table: type[Job], status: JobStatus | None, page: int, per_page: int) -> JobPage:
    """Return one page of a table's jobs, newest first."""
    query = select(table)
    if status is not None:
        query = query.where(table.status == status.value)
    total = turn.session.scalar(select(func.count()).select_from(query.subquery())) or 0
    found = query.order_by(table.id.desc()).limit(per_page).offset((page - 1) * per_page)
    data = [summary_of(job) for job in turn.session.scalars(found)]
    return JobPage(page=page, per_page=per_page, total=total, data=data)


def view_of(turn: Turn, job: Job) -> JobView:
    """Return a job with its attempts."""
    return JobView(
        **summary_of(job).model_dump(),
        queue_position=queue_position(turn, job) if job.status == JobStatus.QUEUED.value else None,
        waits_for=waits_for(turn, job),
        config=job.config,
        progress=job.progress,
        history=job.history,
        checkpoint=job.checkpoint,
        result=job.result,
        error=job.error,
        timings=job.timings,
        activation=job.activation,
        mask_scores=mask_scores(job),
        attempts=[_attempt_view(attempt) for attempt in attempts_of(turn, job.job_id)],
    )


def _attempt_view(attempt: Attempt) -> AttemptView:
    return AttemptView(
        attempt=attempt.attempt,
        worker_id=attempt.worker_id,
        instance_id=attempt.instance_id,
        claimed_at=rfc3339(attempt.claimed_at),
        ended_at=rfc3339_or_none(attempt.ended_at),
        ended_as=attempt.ended_as,
        lapsed_as=attempt.lapsed_as,
        counts=attempt.counts,
        error=attempt.error,
        timings=attempt.timings,
    )


def model_view(model: ModelVersion) -> ModelView:
    """Return a model as the API shows it."""
    return ModelView(
        id=model.id,
        model_name=model.model_name,
        version=model.version,
        sha256_hash=model.sha256_hash,
        file_size_mb=model.file_size_mb,
        file_path=model.file_path,
        metrics=model.metrics,
        training_job_id=model.training_job_id,
        usable=model.usable,
        is_active=model.is_active,
        created_at=rfc3339(model.created_at),
    )


def worker_view(worker: Worker, now: float) -> WorkerView:
    """Return a worker as the API shows it."""
    return WorkerView(
        worker_id=worker.worker_id,
        instance_id=worker.instance_id,
        seen_at=rfc3339(worker.seen_at),
        seen_s_ago=round(now - worker.seen_at, 3),
        desired_state=worker.desired_state,
        alternations=worker.alternations,
        status=worker.status,
    )


def all_models(turn: Turn) -> list[ModelView]:
    """Return every model, newest first."""
    return [
        model_view(model)
        for model in turn.session.scalars(select(ModelVersion).order_by(ModelVersion.id.desc()))
    ]


def all_workers(turn: Turn) -> list[WorkerView]:
    """Return every worker, by name."""
    found = turn.session.scalars(select(Worker).order_by(Worker.worker_id))
    return [worker_view(worker, turn.now) for worker in found]
