"""What is asked of inference, and what is answered: the plan's fields, and what `docs/protocol.md` adds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from rvmcv_worker.reference.wire import Request, Response, Sha256

Fraction = Annotated[float, Field(ge=0, le=1)]
#: A version, a file name or a sha256.
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
#: An address, an object in storage, or a path on this server; the worker judges whether it is allowed.
Url = Annotated[str, StringConstraints(pattern=r"^(https?://|s3://|/)", max_length=4096)]
Purpose = Literal["fraud_check", "playground", "reanalysis", "batch_analysis"]
Wait = Annotated[float, Field(ge=0, le=30, description="Hold the answer so many seconds for the result")]
Side = Annotated[int, Field(ge=1, le=1_000_000)]


def _upright(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    if box[2] < box[0] or box[3] < box[1]:
        raise ValueError("must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    return box


#: ``x1, y1, x2, y2`` in pixels.
Box = Annotated[tuple[float, float, float, float], Field(strict=False), AfterValidator(_upright)]


class Options(Request):
    """Which models, and what is asked of them. What is absent is the worker's default."""

    #: Absent: the active yolo11.
    model_version: ModelName | None = None
    confidence_threshold: Fraction | None = None
    iou_threshold: Fraction | None = None
    img_size: int | None = Field(None, ge=32, le=2048, multiple_of=32)
    max_detections: int | None = Field(None, ge=1, le=1000)
    segmentation: bool = False
    #: `yolo` for the detector's own masks; absent: the active sam2, or else the worker's default.
    segmenter: ModelName | None = None
    mask_format: Literal["png", "png_crop", "rle", "polygon"] | None = None
    annotated: bool = False


class EdgeDetection(Request):
    """What the machine saw: one object."""

    class_: str = Field(alias="class", min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")
    confidence: Fraction
    bbox: Box | None = None


class EdgeResult(Request):
    """What the machine saw on the image."""

    detections: list[EdgeDetection] = Field(max_length=1000)
    model_version: str | None = Field(None, max_length=200)
    image_size: Annotated[tuple[Side, Side] | None, Field(strict=False)] = None


class InferenceRequest(Options):
    """``POST /inference``."""

    #: The client's name for this question: asked again under it, the answer is the first one's job.
    request_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{8,64}$")] | None = None
    image_url: Url
    image_sha256: Sha256 | None = None
    purpose: Purpose | None = None
    edge_result: EdgeResult | None = None
    callback_url: str | None = Field(None, max_length=4096)


class PlaygroundFields(Options):
    """The fields of ``POST /playground-inference`` besides its image. A form has no types but text."""

    model_config = ConfigDict(strict=False)


class InferenceAnswer(Response):
    """An inference as far as it is: with `result` or `error` once it is over."""

    job_id: str
    status: Literal["queued", "processing", "cancelling", "completed", "failed", "cancelled"]
    priority: int
    queue_position: int | None
    #: Where to look again.
    url: str
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    #: Why the last attempt handed it back, while it waits for the next one.
    handed_back: dict[str, Any] | None


class BatchImage(Request):
    """An image of a batch; its `id` comes back with its result."""

    id: Annotated[str, Field(min_length=1, max_length=256)] | Annotated[int, Field(ge=-(2**63), lt=2**63)]
    url: Url
    sha256: Sha256 | None = None


class BatchFields(Options):
    """The fields of ``POST /batch-inference`` besides its images, as a form sends them."""

    model_config = ConfigDict(strict=False)

    purpose: Purpose = "batch_analysis"
    #: Images in a file of results.
    part_size: int | None = Field(None, ge=1, le=10_000)
    callback_url: str | None = Field(None, max_length=4096)


class BatchRequest(BatchFields):
    """``POST /batch-inference`` as JSON: `images`, or a `manifest_url` of JSON Lines of the same."""

    model_config = ConfigDict(strict=True)

    images: list[BatchImage] | None = Field(None, min_length=1)
    manifest_url: Url | None = None
    manifest_sha256: Sha256 | None = None


class ShardView(Response):
    """One job of a batch."""

    shard: int
    job_id: str
    status: str
    images: int | None
    images_done: int
    first_index: int
    #: Line N of the shard's list is line first_line + N - 1 of the batch's.
    first_line: int
    #: Why its last attempt handed it back, while it waits for the next one.
    handed_back: dict[str, Any] | None


class PartView(Response):
    """A file of results: gzipped JSON Lines, whose indexes count from its shard's first image."""

    shard: int
    path: str
    sha256: str
    images: int
    #: The place of its first image in the batch.
    first_index: int


class MissingShard(Response):
    """A shard without results, or with a summary that cannot be read, and why."""

    shard: int
    job_id: str
    status: str
    first_index: int
    images: int | None
    error: dict[str, Any]


class BatchSummary(Response):
    """What came out of a batch, over all its shards that were completed."""

    images_ok: int
    images_failed: int
    errors: dict[str, int]
    classes: dict[str, int]
    backends: dict[str, int]
    #: Over the time from the first shard's start to the last one's end.
    images_per_s: float | None
    latency_ms: dict[str, float | None]
    #: `exact` (one shard), `histogram` (the shards' histograms added), or `upper_bound` (the largest of the
    #: shards' percentiles, which the batch's cannot exceed).
    latency_is: Literal["exact", "histogram", "upper_bound"]
    models_used: list[str]
    models_sha256: list[str]
    parts: list[PartView]
    #: Shards without results.
    missing: list[MissingShard]


BatchStatusName = Literal[
    "queued", "processing", "cancelling", "completed", "completed_with_errors", "failed", "cancelled"
]


class BatchQueued(Response):
    """A batch was queued."""

    batch_id: str
    status: Literal["queued"]
    #: Null where only the worker reads the list.
    images_total: int | None
    shards: int
    url: str


class BatchLine(Response):
    """A batch in a list."""

    batch_id: str
    status: BatchStatusName
    purpose: str | None
    images_total: int | None
    images_done: int
    shards_total: int
    asked_by: str | None
    created_at: str
    finished_at: str | None


class BatchView(BatchLine):
    """A batch, its shards, and, once all are over, its summary."""

    shards: list[ShardView]
    config: dict[str, Any]
    summary: BatchSummary | None


class BatchPage(Response):
    """One page of batches, newest first."""

    page: int
    per_page: int
    total: int
    data: list[BatchLine]


class LogView(Response):
    """A row of ``cv_inference_logs``."""

    id: int
    job_id: str
    purpose: str | None
    model_used: str | None
    processed_by: str
    processing_time_ms: float | None
    detections: list[Any]
    comparison: dict[str, Any] | None
    result_path: str | None
    summary: dict[str, Any] | None
    created_at: str


class LogPage(Response):
    """One page of the log, newest first."""

    page: int
    per_page: int
    total: int
    data: list[LogView]


class AlertView(Response):
    """Something that a person should know of."""

    id: int
    kind: Literal["mismatch", "job_failed", "job_poisoned", "worker_silent", "worker_failed"]
    job_id: str | None
    worker_id: str | None
    message: str
    details: dict[str, Any] | None
    created_at: str
    acknowledged_at: str | None
    acknowledged_by: str | None
    #: Whether the webhook heard of it: `none` is wanted, `waiting`, `sent`, or `given_up`.
    webhook: Literal["none", "waiting", "sent", "given_up"]
    webhook_tries: int
    webhook_error: str | None


class AlertPage(Response):
    """One page of alerts, newest first."""

    page: int
    per_page: int
    total: int
    data: list[AlertView]
