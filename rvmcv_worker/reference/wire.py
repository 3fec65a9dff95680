"""The worker's side of the wire: requests are strict, a key that is not named here is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
WorkerId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
JobTypeName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,49}$")]
JobId = Annotated[str, StringConstraints(min_length=1, max_length=8192)]
LeaseToken = Annotated[str, StringConstraints(min_length=1, max_length=200)]
#: A file's name in a job's folder of the artifacts: no path.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
#: A model's version: too short to be taken for a sha256, since both name a model in one place.
Version = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$")]
#: JSON has no UUIDs: a string in the form of one.
Uuid = Annotated[UUID, Field(strict=False)]
Number = float | None


class Request(BaseModel):
    """A body that a client sends."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Response(BaseModel):
    """A body that this server answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Offer(Request):
    """The query of ``GET job-status``."""

    # A query has no types but strings.
    model_config = ConfigDict(strict=False)

    worker_id: WorkerId
    instance_id: Uuid
    lane: Literal["train", "infer", "batch"]
    job_types: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_,-]{1,500}$")]
    slots: int = Field(ge=1, le=1000)
    gpus_free: int = Field(0, ge=0, le=64)
    #: GPUs that work, free or not; a worker that does not say keeps none free for a job.
    gpus: int = Field(0, ge=0, le=64)
    wait: float = Field(0, ge=0, le=30)
    protocol: int = Field(1, ge=1, le=1)


class OfferedJob(Response):
    """A job as a worker is offered it; ``config`` is for the worker to validate."""

    job_id: str
    id: int
    job_type: str
    priority: int
    created_at: str
    config: dict[str, Any]


class Offers(Response):
    """At most ``slots`` jobs, in the order in which they should be claimed."""

    jobs: list[OfferedJob]


class Claim(Request):
    """Asks for a job; repeated with the same ``claim_id`` it gets the same answer."""

    event: Literal["claim"]
    job_id: JobId
    worker_id: WorkerId
    instance_id: Uuid
    claim_id: Uuid
    status: Literal["processing"] = "processing"


class Resume(Response):
    """Where an earlier attempt left off."""

    path: str | None = None
    url: str | None = None
    sha256: str
    epoch: int | None = None
    next_index: int | None = None


class Claimed(Response):
    """The job is the caller's for ``lease_s``, renewed by every accepted write."""

    lease_token: str
    attempt: int
    lease_s: float
    report_interval_s: float
    resume: Resume | None = None


class Checkpoint(Request):
    """An object in storage from which the next attempt can go on."""

    path: str
    sha256: Sha256
    epoch: int | None = Field(None, ge=0)
    next_index: int | None = Field(None, ge=0)


class Progress(Request):
    """How far a job is; the newest wins, except that every epoch of ``history`` is kept."""

    fraction: float | None = Field(None, ge=0, le=1)
    phase: Literal["download", "verify", "train", "evaluate", "infer", "upload"] | None = None
    epoch: int | None = Field(None, ge=0)
    epochs: int | None = Field(None, ge=0)
    batch_size: int | None = Field(None, ge=1)
    losses: dict[str, Number] | None = None
    metrics: dict[str, Any] | None = None
    history: list[dict[str, Any]] = Field(default_factory=list, max_length=10_000)
    eta_s: float | None = Field(None, ge=0)
    images_done: int | None = Field(None, ge=0)
    images_total: int | None = Field(None, ge=0)
    checkpoint: Checkpoint | None = None
    message: str | None = Field(None, max_length=2000)


class ProgressReport(Request):
    """Renews the lease and asks whether to go on."""

    event: Literal["progress"]
    job_id: JobId
    lease_token: LeaseToken
    seq: int = Field(ge=0)
    status: Literal["processing"] = "processing"
    progress: Progress


class Directive(Response):
    """What the worker should do with the job."""

    directive: Literal["continue", "cancel"]


class Fault(Request):
    """Why a job failed or was handed back: a code of the protocol and a sentence for people."""

    code: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,49}$")]
    message: str = Field(max_length=100_000)
    details: dict[str, Any] | None = None


class Finish(Request):
    """The end of an attempt; repeated with the same ``finish_id`` it gets the same answer."""

    event: Literal["finish"]
    job_id: JobId
    lease_token: LeaseToken
    finish_id: Uuid
    status: Literal["completed", "failed", "cancelled", "queued"]
    result: dict[str, Any] | None = None
    error: Fault | None = None
    timings: dict[str, Any] | None = None
    retry_after_s: float | None = Field(None, ge=0)
    checkpoint: Checkpoint | None = None

    @model_validator(mode="after")
    def _status_has_what_it_needs(self) -> Finish:
        if self.status == "completed" and self.result is None:
            raise ValueError("a completed finish needs a result")
        if self.status in ("failed", "queued") and self.error is None:
            raise ValueError(f"a finish with status {self.status} needs an error")
        if self.retry_after_s is not None and self.status != "queued":
            raise ValueError("retry_after_s goes with status queued only")
        if self.checkpoint is not None and self.status != "queued":
            raise ValueError("a checkpoint goes with status queued only")
        return self


class Accepted(Response):
    """The report is stored and decides the job."""

    accepted: Literal[True] = True


JobEvent = Annotated[Claim | ProgressReport | Finish, Field(discriminator="event")]


class Gpu(Request):
    """A GPU as the worker last read it."""

    index: int = Field(ge=0)
    name: str
    utilization_pct: Number = None
    memory_used_mb: Number = None
    memory_total_mb: Number = None
    temperature_c: Number = None
    power_w: Number = None


class Host(Request):
    """The worker's machine."""

    cpu_pct: Number = None
    memory_used_mb: Number = None
    memory_total_mb: Number = None
    disk_free_gb: Number = None
    workspace_gb: Number = None


class JobCounts(Request):
    """What this worker did since its start."""

    running: int = Field(ge=0)
    completed: int = Field(ge=0)
    failed: int = Field(ge=0)
    cancelled: int = Field(ge=0)
    success_rate: Number = None
    average_s: dict[str, Number] = Field(default_factory=dict)
    per_hour: Number = None
    outbox: int = Field(0, ge=0)


class Engine(Request):
    """An inference engine of the worker."""

    trust: Literal["approved", "other"]
    state: Literal["stopped", "starting", "idle", "busy"]
    device: str | None = Field(None, max_length=200)
    in_flight: int = Field(0, ge=0)
    answered: int = Field(0, ge=0)
    replaced: int = Field(0, ge=0)
    memory_mb: int = Field(0, ge=0)


class Lease(Request):
    """A job that the worker says it holds."""

    job_id: JobId
    lease_token: LeaseToken


class Claims(Request):
    """Which lanes claim jobs at the moment."""

    train: bool
    infer: bool
    batch: bool


class WorkerStatus(Request):
    """A worker shows itself, and renews the leases that it names."""

    worker_id: WorkerId
    instance_id: Uuid
    version: str = Field(max_length=100)
    state: Literal["ready", "busy", "paused", "draining", "degraded"]
    reasons: list[str] = Field(default_factory=list, max_length=100)
    claims: Claims
    uptime_s: float = Field(ge=0)
    sandbox: str = Field(max_length=50)
    gpus: list[Gpu] = Field(default_factory=list)
    host: Host
    jobs: JobCounts
    engines: list[Engine] = Field(default_factory=list, max_length=10)
    leases: list[Lease] = Field(default_factory=list)
    failure: str | None = Field(default=None, max_length=2000)


class StatusIntervals(Response):
    """How often the worker should show itself."""

    idle: float
    busy: float


class WorkerOrders(Response):
    """What the server knows of the worker's leases, and what it wants of the worker."""

    leases: dict[str, Literal["ok", "cancel", "lost"]]
    desired_state: Literal["run", "pause", "drain"]
    interval_s: StatusIntervals
    superseded: bool = False


class UploadFile(Request):
    """A file to be stored under the attempt's keys."""

    name: FileName
    size: int = Field(ge=0)
    sha256: Sha256


class UploadsWanted(Request):
    """Asks for presigned PUTs."""

    job_id: JobId
    lease_token: LeaseToken
    files: list[UploadFile] = Field(min_length=1, max_length=1000)


class Upload(Response):
    """Where to PUT a file, and the path that reports then name."""

    url: str
    path: str


class Uploads(Response):
    """One `Upload` per name."""

    uploads: dict[str, Upload]


class ModelUpload(Request):
    """The fields of ``upload-model``, without the file."""

    model_name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,49}$")]
    version: Version
    metrics: dict[str, Any] | None = None
    training_job_id: int | None = None
    lease_token: LeaseToken | None = None


class StoredModelUpload(ModelUpload):
    """``upload-model`` of an object that already lies in storage."""

    file_path: Annotated[str, StringConstraints(pattern=r"^s3://[^/]+/.+$")]
    sha256_hash: Sha256


class TrainingComplete(Request):
    """The courtesy call after a training."""

    training_job_id: int
    status: Literal["success", "failed"]
    metrics: str | None = None
    error_message: str | None = None


class DatasetData(Response):
    """Where a data set's archive is; `download_url` is relative to the server."""

    dataset_id: int
    name: str
    images_count: int | None
    download_url: str
    sha256: str
    size_bytes: int


class DatasetShown(Response):
    """The answer of ``datasets/{id}``."""

    status: Literal["success"] = "success"
    data: DatasetData


class StoredModelData(Response):
    """A model's row."""

    model_id: int
    sha256_hash: str
    file_size_mb: float
    file_path: str


class StoredModel(Response):
    """The answer of ``upload-model``."""

    status: Literal["success"] = "success"
    data: StoredModelData


class ActiveModelData(Response):
    """The model that RVM-Edge should run."""

    update_available: bool
    model_name: str
    version: str
    sha256_hash: str
    file_size_mb: float
    download_url: str


class ActiveModel(Response):
    """The answer of ``model-sync``."""

    status: Literal["success"] = "success"
    data: ActiveModelData


class Refusal(Response):
    """Why an attempt is fenced."""

    reason: Literal["taken", "cancelled", "finished", "ended", "unknown_job"]
    message: str
