"""Where a job stands, how an attempt ended, and why a request was fenced."""

from __future__ import annotations

from enum import Enum


class JobStatus(str, Enum):
    """The state of a job, as stored in its row and shown to people."""

    #: Waits to be offered; a lapsed attempt may still deliver its result.
    QUEUED = "queued"
    #: One attempt holds it.
    PROCESSING = "processing"
    #: Someone asked to cancel it while an attempt held it; the first accepted finish decides.
    CANCELLING = "cancelling"
    #: Final: its result was accepted.
    COMPLETED = "completed"
    #: Final: a worker failed it, or it was handed back too often.
    FAILED = "failed"
    #: Final: cancelled by an admin, or by its worker's operator, which its error then says.
    CANCELLED = "cancelled"


#: A job in one of these never changes again.
FINAL = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)


class Lapse(str, Enum):
    """Why a job was taken from its attempt before that attempt reported an end."""

    #: Its lease ran out; it may renew or finish as long as nobody else has claimed the job.
    LEASE_EXPIRED = "lease_expired"
    #: Its daemon was started anew; it may only finish, and only before the next claim.
    NEW_INSTANCE = "new_instance"


class Reason(str, Enum):
    """Why a write is refused for good: the attempt that gets one of these is fenced."""

    #: Another attempt owns the job.
    TAKEN = "taken"
    #: The job was cancelled.
    CANCELLED = "cancelled"
    #: The job is completed or failed.
    FINISHED = "finished"
    #: This attempt is over, though the job is not.
    ENDED = "ended"
    #: No job has this id.
    UNKNOWN_JOB = "unknown_job"


class Ability(str, Enum):
    """What a token may do."""

    #: Claim jobs, report on them, fetch their inputs and store their results.
    WORKER = "worker"
    #: Everything that a person does: queue and cancel jobs, activate models, make tokens.
    ADMIN = "admin"
    #: Ask for the active model and download it.
    EDGE = "edge"


class BatchStatus(str, Enum):
    """The state of a batch, by those of its shards."""

    #: No shard has begun.
    QUEUED = "queued"
    #: Some shards are at work, or over.
    PROCESSING = "processing"
    #: Someone asked to cancel it; some shards are not over yet.
    CANCELLING = "cancelling"
    #: Final: every shard was completed. Single images may still have failed.
    COMPLETED = "completed"
    #: Final: some shards have results and some have none; ``missing`` names those.
    COMPLETED_WITH_ERRORS = "completed_with_errors"
    #: Final: no shard has results.
    FAILED = "failed"
    #: Final: at least one shard was cancelled.
    CANCELLED = "cancelled"


class AlertKind(str, Enum):
    """What happened that a person should know of."""

    #: A fraud check says that the machine and the server saw different things.
    MISMATCH = "mismatch"
    #: A job failed, by its worker's word or because it was handed back too often.
    JOB_FAILED = "job_failed"
    #: A job was given up after its workers, or itself, died again and again.
    JOB_POISONED = "job_poisoned"
    #: A worker has not been seen for long, while jobs wait.
    WORKER_SILENT = "worker_silent"
    #: A worker has failed and does not start again by itself.
    WORKER_FAILED = "worker_failed"
