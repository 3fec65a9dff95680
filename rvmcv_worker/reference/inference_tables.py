"""The tables of inferences: their jobs, their batches, and what came out."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from rvmcv_worker.reference.tables import Base, Job, RowId


class InferenceJob(Job):
    """One inference, or a batch of them, or one shard of a batch."""

    __tablename__ = "cv_inference_jobs"

    #: The name of the token that asked for it: RVM-Edge sees its own jobs alone.
    asked_by: Mapped[str | None] = mapped_column(String(100))
    #: The batch that this is a shard of, and which one, from 0.
    batch_id: Mapped[str | None] = mapped_column(Text, index=True)
    shard: Mapped[int | None]
    #: Of the shard: how many images, and where its first one stands in the batch's list (from 0; from 1).
    images: Mapped[int | None]
    first_index: Mapped[int | None]
    first_line: Mapped[int | None]


class Batch(Base):
    """What ``POST /batch-inference`` asked for: one or more shards, each a job."""

    __tablename__ = "cv_inference_batches"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    batch_id: Mapped[str] = mapped_column(Text, unique=True)
    purpose: Mapped[str | None] = mapped_column(String(50))
    #: What every shard is asked, without its images.
    config: Mapped[dict[str, Any]]
    #: Null where the list lies elsewhere and only the worker reads it.
    images_total: Mapped[int | None]
    shards: Mapped[int]
    asked_by: Mapped[str | None] = mapped_column(String(100))
    created_at: Mapped[float]
    cancelled_at: Mapped[float | None]
    #: A `BatchStatus` once every shard is final; null before.
    status: Mapped[str | None] = mapped_column(String(30))
    finished_at: Mapped[float | None]
    #: The shards' summaries, put together, once all are final.
    summary: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)


class InferenceLog(Base):
    """One finished inference, or one finished batch, in the plan's shape."""

    __tablename__ = "cv_inference_logs"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    #: The job's id, or the batch's.
    job_id: Mapped[str] = mapped_column(Text, index=True)
    purpose: Mapped[str | None] = mapped_column(String(50), index=True)
    model_used: Mapped[str | None] = mapped_column(String(100))
    processed_by: Mapped[str] = mapped_column(String(50), default="cv-server")
    processing_time_ms: Mapped[float | None]
    #: Without masks: those are in the job's result, or where `result_path` says. Empty for a batch.
    detections: Mapped[list[Any]] = mapped_column(JSON)
    #: What the machine saw against what was found here.
    comparison: Mapped[dict[str, Any] | None]
    #: Where a result lies that was too large for a report.
    result_path: Mapped[str | None] = mapped_column(Text)
    #: Of a batch: its counts, without its parts.
    summary: Mapped[dict[str, Any] | None]
    created_at: Mapped[float]
