"""What goes over the wire between the worker and RVM-Server: the worker's own models.

What the worker sends refuses unknown keys; what the server answers may have more keys than are
named here, and those that are named have exactly their type. `docs/protocol.md` is normative.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from rvmcv_worker import framing
from rvmcv_worker.job_id import JOB_ID

#: The version of the protocol that this worker speaks.
PROTOCOL_VERSION = 1
#: Largest answer that is read, in bytes.
MAX_ANSWER_BYTES = 8 * 1024 * 1024
#: Largest final report, in bytes; a larger result goes to storage and the report names its path.
MAX_FINISH_BYTES = 512 * 1000
#: Largest result that a final report holds, in bytes; the rest is the report's own.
MAX_RESULT_BYTES = MAX_FINISH_BYTES - 32 * 1000
#: Longest message of an error, in characters; the end is kept, since that is where a log says why.
MAX_ERROR_CHARS = 20_000
#: Longest message of a progress report, in characters.
MAX_PROGRESS_CHARS = 2000
#: Longest job id that can still be reported on, in characters.
MAX_REPORTABLE_ID_CHARS = 8192

JobId = Annotated[str, Field(pattern=f"^{JOB_ID}$")]
JobType = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,49}$")]
LeaseToken = Annotated[str, Field(min_length=1, max_length=4096, repr=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Uuid = Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
ModelVersion = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: A duration that the server sets: no clock and no lock takes a longer one than some centuries.
ServerSeconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
#: A number of the server's that is kept in a database, here and there.
Number = Annotated[int, Field(ge=0, lt=2**63)]


class AnswerError(ValueError):
    """An answer that is not JSON or does not fit; the message names keys, never values."""


class Sent(BaseModel):
    """A body, or a part of one, that the worker sends."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=())


class Answered(BaseModel):
    """A body, or a part of one, that the server answers."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, hide_input_in_errors=True)


# -- 1. Offer ------------------------------------------------------------------------------------


class JobOffer(Answered):
    """A queued job; its `config` is for the job type to validate."""

    job_id: JobId
    id: Number  #: the row in the server's table, not an identity across tables
    job_type: JobType
    priority: int = 0
    created_at: str | None = None  #: RFC 3339, informative
    config: dict[str, Any]


@dataclass(frozen=True)
class MalformedJob:
    """An offered job that does not validate."""

    #: What the server calls the job, where that can be read, to claim and fail it with
    #: `invalid_job`. It is any text at all: fit for a JSON body, never for a path or a bare log line.
    job_id: str | None
    reason: str


def parse_offers(body: dict[str, Any]) -> list[JobOffer | MalformedJob]:
    """Parse the jobs of an offer one by one; raises `AnswerError` when there is no list of them."""
    jobs = body.get("jobs")
    if not isinstance(jobs, list):
        raise AnswerError("jobs: a list is missing")
    return [_parse_offer(job) for job in jobs]


def _parse_offer(job: Any) -> JobOffer | MalformedJob:
    try:
        return JobOffer.model_validate(job)
    except ValidationError as error:
        job_id = job.get("job_id") if isinstance(job, dict) else None
        readable = isinstance(job_id, str) and 0 < len(job_id) <= MAX_REPORTABLE_ID_CHARS
        return MalformedJob(job_id if readable else None, explain(error))


# -- 2. Claim ------------------------------------------------------------------------------------


class ClaimRequest(Sent):
    """Asks for a job; repeated with the same `claim_id` it gets the same answer."""

    event: Literal["claim"] = "claim"
    job_id: Annotated[str, Field(min_length=1, max_length=MAX_REPORTABLE_ID_CHARS)]
    worker_id: str
    instance_id: Uuid
    claim_id: Uuid
    status: Literal["processing"] = "processing"


class Resume(Answered):
    """Where an earlier attempt left off: an object's `path`, or a `url`."""

    path: str | None = None
    url: str | None = None
    sha256: Sha256
    epoch: Annotated[int, Field(ge=0)] | None = None
    next_index: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _has_a_place(self) -> Resume:
        if not (self.path or self.url):
            raise ValueError("neither path nor url")
        return self


class Claim(Answered):
    """The job is ours for `lease_s`, renewed by every accepted write."""

    lease_token: LeaseToken
    attempt: Annotated[Number, Field(ge=1)]
    lease_s: Annotated[ServerSeconds, Field(gt=0)]
    report_interval_s: ServerSeconds = 2.0
    resume: Resume | None = None

    @field_validator("resume", mode="before")
    @classmethod
    def _unreadable_resume_is_none(cls, value: Any) -> Resume | None:
        """A claim must not fail on a checkpoint: the job then starts from the beginning."""
        try:
            return Resume.model_validate(value)
        except ValidationError:
            return None


# -- 3. Progress ---------------------------------------------------------------------------------


class Phase(str, enum.Enum):
    """What a job is doing."""

    DOWNLOAD = "download"  #: its inputs are fetched
    VERIFY = "verify"  #: the data set is unpacked and checked
    TRAIN = "train"  #: epochs run
    EVALUATE = "evaluate"  #: the model is measured
    INFER = "infer"  #: images go through the model
    UPLOAD = "upload"  #: asked right before publishing, which needs a `continue`


class Directive(str, enum.Enum):
    """What the server wants of a running job."""

    CONTINUE = "continue"  #: go on
    CANCEL = "cancel"  #: stop, publish nothing, report `cancelled`


def _text(limit: int) -> BeforeValidator:
    return BeforeValidator(lambda value: value[-limit:] if isinstance(value, str) else value)


class Checkpoint(Sent):
    """An object in storage from which the next attempt can go on."""

    path: str
    sha256: Sha256
    epoch: Annotated[int, Field(ge=0)] | None = None
    next_index: Annotated[int, Field(ge=0)] | None = None


class Progress(Sent):
    """How far a job is. The newest wins, except that no epoch of `history` is left out."""

    fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    phase: Phase | None = None
    epoch: Annotated[int, Field(ge=0)] | None = None
    epochs: Annotated[int, Field(ge=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    losses: dict[str, float | None] | None = None
    metrics: dict[str, Any] | None = None
    history: list[dict[str, Any]] = []
    eta_s: Seconds | None = None
    images_done: Annotated[int, Field(ge=0)] | None = None
    images_total: Annotated[int, Field(ge=0)] | None = None
    checkpoint: Checkpoint | None = None
    message: Annotated[str, _text(MAX_PROGRESS_CHARS)] | None = None


def progress_of(report: Mapping[str, Any]) -> Progress:
    """Make a `Progress` of what a child reported, leaving out each key that is not known or not valid."""
    known = {key: value for key, value in report.items() if key in Progress.model_fields}
    try:
        return Progress.model_validate(known)
    except ValidationError as error:
        bad = {item["loc"][0] for item in error.errors()}
        return Progress.model_validate({key: value for key, value in known.items() if key not in bad})


class ProgressReport(Sent):
    """Renews the lease and asks whether to go on; `seq` rises with each report of a lease."""

    event: Literal["progress"] = "progress"
    job_id: str
    lease_token: LeaseToken
    seq: Annotated[int, Field(ge=0)]
    status: Literal["processing"] = "processing"
    progress: Progress


class ProgressAnswer(Answered):
    """Whether to go on."""

    directive: Annotated[Directive, Field(strict=False)]


# -- 4. Finish -----------------------------------------------------------------------------------


class FinishStatus(str, enum.Enum):
    """How an attempt ends."""

    COMPLETED = "completed"  #: final: there is a result
    FAILED = "failed"  #: final: the job cannot succeed, and the error says why
    CANCELLED = "cancelled"  #: final: the server asked for it, or the operator, which the error says
    QUEUED = "queued"  #: handed back: another attempt may succeed


class WireError(Sent):
    """A code of the protocol's table and a message that says what, where and what to do."""

    code: str
    message: Annotated[str, _text(MAX_ERROR_CHARS)]
    details: dict[str, Any] | None = None  #: what was found until then, such as the data set's report


class FinishReport(Sent):
    """The end of an attempt; repeated with the same `finish_id` it gets the same answer."""

    event: Literal["finish"] = "finish"
    job_id: str
    lease_token: LeaseToken
    finish_id: Uuid
    status: FinishStatus
    result: dict[str, Any] | None = None  #: beside an `error`, only `artifacts`
    error: WireError | None = None
    retry_after_s: Seconds | None = None  #: with `queued` only
    checkpoint: Checkpoint | None = None  #: with `queued` only: where the next attempt goes on
    timings: dict[str, float | None] | None = None  #: seconds by step

    @model_validator(mode="after")
    def _status_has_what_it_needs(self) -> FinishReport:
        if self.status is FinishStatus.COMPLETED and self.result is None:
            raise ValueError("a completed finish needs a result")
        if self.status in {FinishStatus.FAILED, FinishStatus.QUEUED} and self.error is None:
            raise ValueError(f"a finish with status {self.status.value} needs an error")
        if self.retry_after_s is not None and self.status is not FinishStatus.QUEUED:
            raise ValueError("retry_after_s goes with status queued only")
        if self.checkpoint is not None and self.status is not FinishStatus.QUEUED:
            raise ValueError("a checkpoint goes with status queued only")
        return self


class FinishAnswer(Answered):
    """The report is stored and decides the job."""

    accepted: Literal[True]


# -- 5. Worker status ----------------------------------------------------------------------------


class WorkerState(str, enum.Enum):
    """What the worker as a whole is doing; what it claims is told per lane by `claims`."""

    READY = "ready"  #: nothing runs, jobs are claimed
    BUSY = "busy"  #: at least one job runs
    PAUSED = "paused"  #: nothing is claimed, running jobs finish
    DRAINING = "draining"  #: nothing is claimed, running jobs are handed back
    DEGRADED = "degraded"  #: something is wrong; `reasons` says what, and what to do


class DesiredState(str, enum.Enum):
    """What the server wants of the worker."""

    RUN = "run"  #: claim and run
    PAUSE = "pause"  #: claim nothing, let running jobs finish
    DRAIN = "drain"  #: claim nothing, hand running jobs back, stay up


class LeaseState(str, enum.Enum):
    """What the server says of a lease that the worker named."""

    OK = "ok"  #: renewed
    CANCEL = "cancel"  #: the job shall be cancelled
    LOST = "lost"  #: another attempt's, or over: fenced


class LaneClaims(Sent):
    """Which lanes claim jobs at the moment."""

    train: bool
    infer: bool
    batch: bool


class GpuStatus(Sent):
    """A GPU as last read; None is a reading that failed."""

    index: Annotated[int, Field(ge=0)]
    name: str
    utilization_pct: float | None = None
    memory_used_mb: float | None = None
    memory_total_mb: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None


class HostStatus(Sent):
    """The worker's machine."""

    cpu_pct: float | None = None
    memory_used_mb: float | None = None
    memory_total_mb: float | None = None
    disk_free_gb: float | None = None
    workspace_gb: float | None = None


class JobTotals(Sent):
    """What this worker did since its start."""

    running: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    success_rate: float | None = None
    average_s: dict[str, float] = {}
    per_hour: float | None = None
    outbox: int = 0  #: final reports that wait to be delivered


class EngineStatus(Sent):
    """An inference engine that was asked something since the worker started."""

    trust: str  #: ``approved`` or ``other``: whose models it runs
    state: str  #: ``stopped``, ``starting``, ``idle``, ``busy``
    device: str | None = None  #: ``cpu``, or a GPU; None while it is stopped
    in_flight: Annotated[int, Field(ge=0)] = 0  #: images that are asked about now
    answered: Annotated[int, Field(ge=0)] = 0
    replaced: Annotated[int, Field(ge=0)] = 0  #: how often it failed and a fresh one took its place
    memory_mb: Annotated[int, Field(ge=0)] = 0


class LeaseRef(Sent):
    """A lease that the worker holds and wants renewed."""

    job_id: str
    lease_token: LeaseToken


class WorkerStatus(Sent):
    """The worker shows itself, and renews the leases that it names."""

    worker_id: str
    instance_id: Uuid
    version: str
    state: WorkerState
    reasons: list[str] = []
    claims: LaneClaims
    uptime_s: Seconds
    sandbox: str
    gpus: list[GpuStatus] = []
    host: HostStatus = HostStatus()
    jobs: JobTotals = JobTotals()
    engines: list[EngineStatus] = []
    leases: list[LeaseRef] = []
    #: Why the worker has failed for good and stays off; told once, when its daemon is gone.
    failure: str | None = None


class StatusIntervals(Answered):
    """Seconds between two worker statuses, without and with a running job."""

    idle: Annotated[ServerSeconds, Field(gt=0)] = 10.0
    busy: Annotated[ServerSeconds, Field(gt=0)] = 3.0


class WorkerStatusAnswer(Answered):
    """What the server knows of the leases, and what it wants of the worker."""

    leases: dict[str, Annotated[LeaseState, Field(strict=False)]] = {}
    desired_state: Annotated[DesiredState, Field(strict=False)] = DesiredState.RUN
    interval_s: StatusIntervals = StatusIntervals()
    #: A newer daemon of the same `worker_id` has spoken: this one is offered nothing any more.
    superseded: bool = False


# -- 6. Storage ----------------------------------------------------------------------------------


class UploadFile(Sent):
    """A file to be stored under the attempt's keys."""

    name: str
    size: Annotated[int, Field(ge=0)]  #: bytes
    sha256: Sha256


class UploadRequest(Sent):
    """Asks for presigned PUTs."""

    job_id: str
    lease_token: LeaseToken
    files: list[UploadFile]


class UploadSlot(Answered):
    """Where to PUT a file, and the path that reports then name."""

    url: Annotated[str, Field(repr=False)]  #: presigned: as secret as a password while it lasts
    path: str


class UploadSlots(Answered):
    """One slot per file name."""

    uploads: dict[str, UploadSlot]


# -- 7. As in today's RVM-Server -----------------------------------------------------------------


class DatasetInfo(Answered):
    """Where a data set is; `download_url` may be relative to the server."""

    dataset_id: int | str | None = None
    name: str | None = None
    images_count: int | None = None
    download_url: Annotated[str, Field(min_length=1)]
    sha256: Sha256 | None = None
    size_bytes: Annotated[int, Field(ge=0)] | None = None


class ModelUpload(Sent):
    """The fields of `upload-model` beside the file."""

    model_name: str
    version: ModelVersion
    metrics: dict[str, Any]
    training_job_id: Annotated[int, Field(ge=0)]
    lease_token: LeaseToken


class StoredModelUpload(ModelUpload):
    """`upload-model` of an object that already lies in storage."""

    file_path: str
    sha256_hash: Sha256


class UploadedModel(Answered):
    """The model's row at the server."""

    model_id: int | str
    sha256_hash: Sha256
    file_size_mb: float | None = None
    file_path: str | None = None


class TrainingComplete(Sent):
    """The courtesy call after a training."""

    training_job_id: int
    status: Literal["success", "failed"]
    metrics: str | None = None  #: a string of JSON
    error_message: str | None = None


# -- To and from bytes ---------------------------------------------------------------------------

Model = TypeVar("Model", bound=BaseModel)


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse an answer's body, which must be one object of bounded size and depth."""
    if len(data) > MAX_ANSWER_BYTES:
        raise AnswerError(f"longer than {MAX_ANSWER_BYTES} bytes")
    try:
        return framing.parse_object(data)
    except framing.FramingError as error:
        raise AnswerError(str(error)) from None


def parse(model: type[Model], body: Any) -> Model:
    """Read an answer, or a part of one, as `model`; raises `AnswerError`."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise AnswerError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """Say which keys are wrong and why, without their values."""
    items = error.errors(include_url=False, include_input=False, include_context=False)
    said = []
    for item in items[:5]:
        key = ".".join(str(part)[:64] for part in item["loc"]) or "the whole"
        said.append(f"{key}: {item['msg']}")
    return "; ".join(said) + (f"; and {len(items) - 5} more" if len(items) > 5 else "")


def to_wire(body: BaseModel) -> dict[str, Any]:
    """Return what is sent for `body`: absent fields left out, numbers that are not finite None."""
    wire: dict[str, Any] = _storable(framing.finite(body.model_dump(mode="json", exclude_none=True)))
    return wire


def encode(body: BaseModel | dict[str, Any]) -> bytes:
    """Return `body` as JSON bytes."""
    wire = to_wire(body) if isinstance(body, BaseModel) else _storable(framing.finite(body))
    return json.dumps(wire, allow_nan=False, separators=(",", ":")).encode()


def multipart_fields(upload: ModelUpload) -> dict[str, str]:
    """Return the form fields of `upload-model`; `metrics` is a string of JSON there."""
    wire = to_wire(upload)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in wire.items()}


def _storable(value: Any) -> Any:
    """Replace NUL and half surrogate pairs: no database's text column takes them, so no server would."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_storable(item) for item in value]
    return value
