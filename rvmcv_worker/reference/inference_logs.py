"""What is kept of a completed inference: a row of ``cv_inference_logs``, and an alert for a mismatch."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import func, select

from rvmcv_worker.reference import inference_wire
from rvmcv_worker.reference.alerts import alert_of_job
from rvmcv_worker.reference.inference_tables import InferenceJob, InferenceLog
from rvmcv_worker.reference.states import AlertKind
from rvmcv_worker.reference.texts import storable
from rvmcv_worker.reference.times import rfc3339
from rvmcv_worker.reference.turn import Turn

#: Milliseconds that an inference may have taken; more is nonsense.
_LARGEST = 1e12


def log_inference(turn: Turn, job: InferenceJob, result: dict[str, Any]) -> None:
    """Log a completed job. A shard is not logged: its batch is, once, when all of it is over."""
    if job.batch_id is not None:
        return
    # What is no character would spoil the page of every row beside it.
    result = json.loads(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace"))
    comparison = result.get("comparison")
    batch = job.job_type == "batch-inference"
    turn.session.add(
        InferenceLog(
            job_id=job.job_id,
            purpose=_text(job.config.get("purpose"), 50),
            model_used=_text(result.get("model_used"), 100),
            processing_time_ms=_number(result.get("processing_time_ms")),
            detections=_without_masks(result.get("detections")),
            comparison=comparison if isinstance(comparison, dict) else None,
            result_path=_text(result.get("result_path"), 4096),
            summary={key: value for key, value in result.items() if key != "parts"} if batch else None,
            created_at=turn.now,
        )
    )
    if isinstance(comparison, dict) and comparison.get("mismatch") is True:
        _alert_of_mismatch(turn, job, comparison)


def view_of_log(log: InferenceLog) -> inference_wire.LogView:
    """Return a row of the log as it is shown."""
    return inference_wire.LogView(
        id=log.id,
        job_id=log.job_id,
        purpose=log.purpose,
        model_used=log.model_used,
        processed_by=log.processed_by,
        processing_time_ms=log.processing_time_ms,
        detections=log.detections,
        comparison=log.comparison,
        result_path=log.result_path,
        summary=log.summary,
        created_at=rfc3339(log.created_at),
    )


def page_of_logs(turn: Turn, purpose: str | None, page: int, per_page: int) -> inference_wire.LogPage:
    """Return one page of the log, newest first."""
    query = select(InferenceLog)
    if purpose is not None:
        query = query.where(InferenceLog.purpose == purpose)
    total = turn.session.scalar(select(func.count()).select_from(query.subquery())) or 0
    found = query.order_by(InferenceLog.id.desc()).limit(per_page).offset((page - 1) * per_page)
    data = [view_of_log(log) for log in turn.session.scalars(found)]
    return inference_wire.LogPage(page=page, per_page=per_page, total=total, data=data)


def _text(value: Any, limit: int) -> str | None:
    return storable(value[:limit]) if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    fits = isinstance(value, (int, float)) and abs(value) <= _LARGEST
    return float(value) if fits else None


def _without_masks(detections: Any) -> list[Any]:
    if not isinstance(detections, list):
        return []
    return [
        {key: value for key, value in found.items() if key != "segmentation"}
        for found in detections
        if isinstance(found, dict)
    ]


def _alert_of_mismatch(turn: Turn, job: InferenceJob, comparison: dict[str, Any]) -> None:
    reasons = [reason for reason in comparison.get("reasons") or [] if isinstance(reason, dict)]
    why = "; ".join(str(reason.get("message", reason.get("code", ""))) for reason in reasons)
    details = {
        "purpose": job.config.get("purpose"),
        "image_url": job.config.get("image_url"),
        "asked_by": job.asked_by,
        "reasons": reasons,
    }
    message = f"machine and server saw different things: {why or 'no reason was told'}"
    alert_of_job(turn, AlertKind.MISMATCH, job, message, details)
