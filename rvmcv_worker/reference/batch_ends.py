"""The end of a batch: once its last shard is over, in that shard's transaction."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select, update

from rvmcv_worker.reference import batch_summary
from rvmcv_worker.reference.inference_tables import Batch, InferenceJob, InferenceLog
from rvmcv_worker.reference.states import FINAL, BatchStatus, JobStatus
from rvmcv_worker.reference.turn import Turn


def settle_batch(turn: Turn, batch_id: str) -> None:
    """End the batch if this was its last shard: its summary, and one row in the log."""
    # Locked before the look, or two shards that end at once would each take the other for unfinished.
    batch = turn.session.scalar(select(Batch).where(Batch.batch_id == batch_id).with_for_update())
    if batch is None or batch.status is not None:
        return
    statuses = turn.session.scalars(
        select(InferenceJob.status).where(InferenceJob.batch_id == batch_id)
    ).all()
    if any(status not in FINAL for status in statuses):
        return
    batch.summary = batch_summary.merge(shards_of(turn, batch_id))
    batch.status = _status_of(statuses, len(batch.summary["missing"])).value
    batch.finished_at = turn.now
    if batch.images_total is None and batch.status == BatchStatus.COMPLETED.value:
        # Only the worker has read the list, all of it: there is one shard.
        batch.images_total = batch.summary["images_ok"] + batch.summary["images_failed"]
        of_one = update(InferenceJob).where(InferenceJob.batch_id == batch_id)
        turn.session.execute(of_one.values(images=batch.images_total))
    if JobStatus.COMPLETED.value not in statuses:
        return
    models = batch.summary["models_used"]
    turn.session.add(
        InferenceLog(
            job_id=batch_id,
            purpose=batch.purpose,
            model_used=models[0][:100] if models else None,
            detections=[],
            summary={
                "images_total": batch.images_total,
                "status": batch.status,
                **{key: value for key, value in batch.summary.items() if key != "parts"},
            },
            created_at=turn.now,
        )
    )


def shards_of(turn: Turn, batch_id: str) -> list[batch_summary.Shard]:
    """Return the shards with what came out of each, in order."""
    job = InferenceJob
    columns = (
        job.shard,
        job.job_id,
        job.status,
        job.images,
        job.first_index,
        job.started_at,
        job.finished_at,
        job.result,
        job.error,
    )
    rows = turn.session.execute(select(*columns).where(job.batch_id == batch_id).order_by(job.shard))
    return [batch_summary.Shard(*row) for row in rows]


def _status_of(statuses: Sequence[str], missing: int) -> BatchStatus:
    if JobStatus.CANCELLED.value in statuses:
        return BatchStatus.CANCELLED
    if missing == 0:
        return BatchStatus.COMPLETED
    return BatchStatus.FAILED if missing == len(statuses) else BatchStatus.COMPLETED_WITH_ERRORS
