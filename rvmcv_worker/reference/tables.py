"""The tables. Times are seconds since 1970 on the database's clock."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
    false,
    literal_column,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column

from rvmcv_worker.reference.settings import Timing
from rvmcv_worker.reference.states import JobStatus

#: SQLite numbers rows by itself only for INTEGER.
RowId = BigInteger().with_variant(Integer, "sqlite")
Seconds = Float(53)


def rank_of(priority: Any, created_at: Any, ageing_s: float) -> Any:
    """Return the SQL expression that jobs are offered by, lowest first.

    Waiting for `ageing_s` is worth one step of priority; the time of asking is the same for all, so it is
    left out. An index serves the default `ageing_s`.
    """
    return created_at / literal_column(repr(float(ageing_s)), Seconds) - priority


class Base(DeclarativeBase):
    """What ``create_all`` makes."""

    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON,
        float: Seconds,
    }


class Job(Base):
    """What training and inference jobs share; each has a table of its own."""

    __abstract__ = True

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[Index, ...]:
        """Jobs in the order in which they are offered."""
        rank = rank_of(cls.priority, cls.created_at, Timing.ageing_s)
        return (Index(f"ix_{cls.__tablename__}_rank", cls.status, rank, cls.created_at, cls.id),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str] = mapped_column(Text, unique=True)
    job_type: Mapped[str] = mapped_column(String(50))
    status: Mapped[str] = mapped_column(String(20), default=JobStatus.QUEUED.value)
    priority: Mapped[int] = mapped_column(Integer, default=0)
    config: Mapped[dict[str, Any]]
    #: The newest attempt's number; 0 before the first claim.
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    #: Not offered before this.
    not_before: Mapped[float] = mapped_column(Seconds, default=0.0)
    offered_to: Mapped[str | None] = mapped_column(String(100))
    offered_until: Mapped[float] = mapped_column(Seconds, default=0.0)
    progress: Mapped[dict[str, Any] | None]
    #: One entry per epoch, as reported. Large, so it is read only where it is looked at; so is the result.
    history: Mapped[list[Any]] = mapped_column(JSON, default=list, deferred=True)
    #: Where the next attempt goes on: ``path`` or ``url``, ``sha256``, ``epoch`` or ``next_index``.
    checkpoint: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    error: Mapped[dict[str, Any] | None]
    timings: Mapped[dict[str, Any] | None]
    #: Whether the job's model was activated, and why or why not.
    activation: Mapped[dict[str, Any] | None]


class TrainingJob(Job):
    """A training, from ``POST /train``."""

    __tablename__ = "cv_training_jobs"


class Attempt(Base):
    """One accepted claim. Its lease token is compared in every statement that writes."""

    __tablename__ = "cv_job_attempts"
    __table_args__ = (UniqueConstraint("job_id", "attempt"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str] = mapped_column(Text)
    attempt: Mapped[int]
    claim_id: Mapped[str] = mapped_column(String(36), unique=True)
    lease_token_hash: Mapped[str] = mapped_column(String(64), index=True)
    worker_id: Mapped[str] = mapped_column(String(100), index=True)
    instance_id: Mapped[str] = mapped_column(String(36))
    lease_s: Mapped[float]
    lease_until: Mapped[float]
    claimed_at: Mapped[float]
    #: The highest ``seq`` of a progress report.
    last_seq: Mapped[int] = mapped_column(default=-1)
    #: A `Lapse`, when the job was taken back before the attempt reported an end.
    lapsed_as: Mapped[str | None] = mapped_column(String(20))
    #: Whether it counts towards the poison limit.
    counts: Mapped[bool] = mapped_column(default=False, server_default=false())
    finish_id: Mapped[str | None] = mapped_column(String(36), unique=True)
    #: The status of its accepted finish, a `Lapse`, or ``cancelled``; null while it may still report.
    ended_as: Mapped[str | None] = mapped_column(String(20), index=True)
    ended_at: Mapped[float | None]
    error: Mapped[dict[str, Any] | None]
    timings: Mapped[dict[str, Any] | None]


class ModelVersion(Base):
    """A checkpoint in storage."""

    __tablename__ = "ai_model_versions"
    __table_args__ = (UniqueConstraint("model_name", "version"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    model_name: Mapped[str] = mapped_column(String(50))
    version: Mapped[str] = mapped_column(String(50), index=True)
    file_path: Mapped[str] = mapped_column(Text)
    sha256_hash: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    file_size_mb: Mapped[float]
    metrics: Mapped[dict[str, Any] | None]
    training_job_id: Mapped[int | None] = mapped_column(BigInteger, index=True)
    attempt: Mapped[int | None]
    #: False until a completed finish names it: before, it can be had by its hash and no more.
    usable: Mapped[bool]
    is_active: Mapped[bool] = mapped_column(default=False, server_default=false())
    created_at: Mapped[float]


class ModelActivation(Base):
    """One change of the active model: the history that a roll-back reads."""

    __tablename__ = "ai_model_activations"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("ai_model_versions.id"))
    previous_model_id: Mapped[int | None] = mapped_column(BigInteger)
    #: The name of the admin's token, or ``auto_activate``.
    activated_by: Mapped[str] = mapped_column(String(100))
    activated_at: Mapped[float]


class Dataset(Base):
    """A data set's archive in storage."""

    __tablename__ = "datasets"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    path: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    images_count: Mapped[int | None]
    created_at: Mapped[float]


class Token(Base):
    """A bearer token, known by its hash alone."""

    __tablename__ = "api_tokens"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    token_hash: Mapped[str] = mapped_column(String(64), unique=True)
    abilities: Mapped[list[Any]]
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]


class Worker(Base):
    """A worker as it last showed itself."""

    __tablename__ = "cv_workers"

    worker_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    instance_id: Mapped[str] = mapped_column(String(36))
    #: Earlier instances, oldest first: one that comes back is a second daemon of the same name.
    past_instances: Mapped[list[Any]] = mapped_column(JSON, default=list)
    #: How often a past instance came back since the newest came; more than a few means that two daemons
    #: share the name.
    alternations: Mapped[int] = mapped_column(default=0)
    desired_state: Mapped[str] = mapped_column(String(10), default="run")
    status: Mapped[dict[str, Any] | None]
    seen_at: Mapped[float]
    #: The `seen_at` of the last silence that people were told of.
    silence_told: Mapped[float | None]


class ReaperTick(Base):
    """When the reaper last looked: one row."""

    __tablename__ = "cv_reaper_ticks"

    id: Mapped[int] = mapped_column(primary_key=True)
    ticked_at: Mapped[float]
    #: When it last came back from having been away: before, no worker could show itself.
    back_at: Mapped[float | None]


class Alert(Base):
    """Something that a person should know of."""

    __tablename__ = "cv_alerts"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    #: An `AlertKind`.
    kind: Mapped[str] = mapped_column(String(20), index=True)
    #: What it is about: each thing alerts once.
    occasion: Mapped[str] = mapped_column(Text, unique=True)
    job_id: Mapped[str | None] = mapped_column(Text)
    worker_id: Mapped[str | None] = mapped_column(String(100))
    message: Mapped[str] = mapped_column(Text)
    details: Mapped[dict[str, Any] | None]
    created_at: Mapped[float]
    acknowledged_at: Mapped[float | None]
    #: The name of the admin's token.
    acknowledged_by: Mapped[str | None] = mapped_column(String(100))
    #: When the webhook is to be called next; null when there is nothing (more) to call it for.
    send_at: Mapped[float | None] = mapped_column(Seconds, index=True)
    #: Calls of the webhook so far.
    tries: Mapped[int] = mapped_column(default=0)
    sent_at: Mapped[float | None]
    #: Why the last call did not arrive.
    send_error: Mapped[str | None] = mapped_column(Text)
