"""Alerts: each thing that a person should know of makes one row, in the transaction in which it happened."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import exists, func, or_, select

from rvmcv_worker.reference import inference_wire
from rvmcv_worker.reference.inference_tables import InferenceJob
from rvmcv_worker.reference.states import AlertKind, JobStatus
from rvmcv_worker.reference.tables import Alert, Job, TrainingJob, Worker
from rvmcv_worker.reference.texts import storable
from rvmcv_worker.reference.times import rfc3339, rfc3339_or_none
from rvmcv_worker.reference.turn import Turn


def alert_of_job(turn: Turn, kind: AlertKind, job: Job, message: str, details: dict[str, Any]) -> None:
    """Tell people of a job, once per kind."""
    told = {"job_type": job.job_type, **details}
    _add(turn, kind, job.job_id, message, told, job_id=job.job_id)


def alert_of_failed_worker(turn: Turn, worker_id: str, instance_id: str, failure: str) -> None:
    """Tell people of a worker that stays off, once per daemon of its that they knew, and reason."""
    occasion = f"{worker_id} {instance_id} {failure}"
    message = f"{worker_id}: {failure}"
    _add(turn, AlertKind.WORKER_FAILED, occasion, message, {"instance_id": instance_id}, worker_id=worker_id)


def alert_of_silent_workers(turn: Turn, *, back_at: float) -> None:
    """Tell people of each worker that shows itself no more, once per silence, if jobs wait as long.

    `back_at` is when this server came back from having been away: only since then can it be missed.
    """
    silent_from = turn.now - turn.settings.silent_intervals * turn.settings.timing.status_idle_s
    if back_at > silent_from:
        return
    untold = or_(Worker.silence_told.is_(None), Worker.silence_told != Worker.seen_at)
    silent = turn.session.scalars(
        select(Worker)
        # Who never told a status is no daemon: `doctor` polls once, under a name of its own.
        .where(Worker.seen_at < silent_from, Worker.status.is_not(None), untold)
        .order_by(Worker.worker_id)
        .with_for_update()
    ).all()
    waiting = _waiting_since(turn, silent_from) if silent else 0
    for worker in silent if waiting else ():
        worker.silence_told = worker.seen_at
        silent_s = turn.now - worker.seen_at
        message = f"{worker.worker_id} has not been seen for {silent_s:.0f} s; jobs that wait: {waiting}"
        occasion = f"{worker.worker_id} {worker.seen_at!r}"
        details = {"jobs_waiting": waiting, "seen_at": rfc3339(worker.seen_at)}
        _add(turn, AlertKind.WORKER_SILENT, occasion, message, details, worker_id=worker.worker_id)


def _waiting_since(turn: Turn, moment: float) -> int:
    counts = [
        turn.session.scalar(
            select(func.count()).where(
                table.status == JobStatus.QUEUED.value, table.created_at <= moment, table.not_before <= moment
            )
        )
        for table in (TrainingJob, InferenceJob)
    ]
    return sum(count or 0 for count in counts)


def acknowledge(turn: Turn, alert_id: int, by: str) -> Alert | None:
    """Note that somebody has seen to it; the first one's name is kept."""
    alert = turn.session.get(Alert, alert_id, with_for_update=True)
    if alert is not None and alert.acknowledged_at is None:
        alert.acknowledged_at, alert.acknowledged_by = turn.now, by
    return alert


def view_of_alert(alert: Alert) -> inference_wire.AlertView:
    """Return an alert as it is shown and sent."""
    webhook: Literal["none", "waiting", "sent", "given_up"] = "none"
    if alert.send_at is not None:
        webhook = "waiting"
    elif alert.tries:
        webhook = "given_up" if alert.sent_at is None else "sent"
    return inference_wire.AlertView(
        id=alert.id,
        kind=alert.kind,
        job_id=alert.job_id,
        worker_id=alert.worker_id,
        message=alert.message,
        details=alert.details,
        created_at=rfc3339(alert.created_at),
        acknowledged_at=rfc3339_or_none(alert.acknowledged_at),
        acknowledged_by=alert.acknowledged_by,
        webhook=webhook,
        webhook_tries=alert.tries,
        webhook_error=alert.send_error,
    )


def page_of_alerts(
    turn: Turn, *, kind: AlertKind | None, acknowledged: bool | None, page: int, per_page: int
) -> inference_wire.AlertPage:
    """Return one page of alerts, newest first."""
    query = select(Alert)
    if kind is not None:
        query = query.where(Alert.kind == kind.value)
    if acknowledged is not None:
        query = query.where(Alert.acknowledged_at.is_not(None) == acknowledged)
    total = turn.session.scalar(select(func.count()).select_from(query.subquery())) or 0
    found = query.order_by(Alert.id.desc()).limit(per_page).offset((page - 1) * per_page)
    data = [view_of_alert(alert) for alert in turn.session.scalars(found)]
    return inference_wire.AlertPage(page=page, per_page=per_page, total=total, data=data)


def _add(
    turn: Turn,
    kind: AlertKind,
    subject: str,
    message: str,
    details: dict[str, Any],
    *,
    job_id: str | None = None,
    worker_id: str | None = None,
) -> None:
    occasion = f"{kind.value} {subject}"
    if turn.session.scalar(select(exists().where(Alert.occasion == occasion))):
        return
    turn.session.add(
        Alert(
            kind=kind.value,
            occasion=occasion,
            job_id=job_id,
            worker_id=worker_id,
            message=storable(message),
            details=details,
            created_at=turn.now,
            send_at=turn.now if turn.settings.webhook_url else None,
        )
    )
