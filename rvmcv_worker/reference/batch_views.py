"""What is shown of batches while they run and afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, func, select

from rvmcv_worker.reference import inference_wire
from rvmcv_worker.reference.inference_tables import Batch, InferenceJob
from rvmcv_worker.reference.jobs import last_hand_back
from rvmcv_worker.reference.states import BatchStatus, JobStatus
from rvmcv_worker.reference.times import rfc3339, rfc3339_or_none
from rvmcv_worker.reference.turn import Turn

_COLUMNS = (
    InferenceJob.shard,
    InferenceJob.job_id,
    InferenceJob.status,
    InferenceJob.attempt,
    InferenceJob.images,
    InferenceJob.first_index,
    InferenceJob.first_line,
    InferenceJob.progress,
)


def view_of_batch(turn: Turn, batch: Batch) -> inference_wire.BatchView:
    """Return a batch with its shards."""
    shards = _shards(turn, batch)
    summary = None if batch.summary is None else inference_wire.BatchSummary.model_validate(batch.summary)
    return inference_wire.BatchView(
        **_line(batch, shards).model_dump(),
        shards=[
            inference_wire.ShardView(
                shard=shard.shard,
                job_id=shard.job_id,
                status=shard.status,
                images=shard.images,
                images_done=_done(shard),
                first_index=shard.first_index,
                first_line=shard.first_line,
                handed_back=last_hand_back(turn, shard),
            )
            for shard in shards
        ],
        config=batch.config,
        summary=summary,
    )


def page_of_batches(turn: Turn, page: int, per_page: int) -> inference_wire.BatchPage:
    """Return one page of batches, newest first."""
    total = turn.session.scalar(select(func.count()).select_from(Batch)) or 0
    query = select(Batch).order_by(Batch.id.desc()).limit(per_page).offset((page - 1) * per_page)
    lines = [_line(batch, _shards(turn, batch)) for batch in turn.session.scalars(query)]
    return inference_wire.BatchPage(page=page, per_page=per_page, total=total, data=lines)


def _shards(turn: Turn, batch: Batch) -> Sequence[Row[Any]]:
    of_batch = select(*_COLUMNS).where(InferenceJob.batch_id == batch.batch_id)
    return turn.session.execute(of_batch.order_by(InferenceJob.shard)).all()


def _line(batch: Batch, shards: Sequence[Row[Any]]) -> inference_wire.BatchLine:
    return inference_wire.BatchLine(
        batch_id=batch.batch_id,
        status=batch.status or _running_status(batch, shards).value,
        purpose=batch.purpose,
        images_total=batch.images_total,
        images_done=sum(_done(shard) for shard in shards),
        shards_total=batch.shards,
        asked_by=batch.asked_by,
        created_at=rfc3339(batch.created_at),
        finished_at=rfc3339_or_none(batch.finished_at),
    )


def _running_status(batch: Batch, shards: Sequence[Row[Any]]) -> BatchStatus:
    if batch.cancelled_at is not None:
        return BatchStatus.CANCELLING
    begun = any(shard.attempt or shard.status != JobStatus.QUEUED.value for shard in shards)
    return BatchStatus.PROCESSING if begun else BatchStatus.QUEUED


def _done(shard: Row[Any]) -> int:
    """Return how many of a shard's images have results, or will have when it ends."""
    if shard.status == JobStatus.COMPLETED.value and shard.images is not None:
        return int(shard.images)
    if shard.status in (JobStatus.FAILED.value, JobStatus.CANCELLED.value):
        return 0
    return int((shard.progress or {}).get("images_done") or 0)
