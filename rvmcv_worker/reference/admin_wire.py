"""What admins send, and what they are answered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rvmcv_worker.reference.wire import JobTypeName, Request, Response, Sha256


class TrainRequest(Request):
    """The plan's ``POST /train``. Values are checked by the worker, which knows what it can do."""

    job_type: JobTypeName = "yolo11"
    dataset_id: int | None = None
    dataset_url: str | None = Field(None, max_length=4000)
    dataset_sha256: Sha256 | None = None
    base_model: str | None = Field(None, max_length=200)
    base_model_sha256: Sha256 | None = None
    epochs: int | None = None
    img_size: int | None = None
    batch_size: int | None = None
    callback_url: str | None = Field(None, max_length=4000)
    priority: int = Field(0, ge=-100, le=100)
    #: Further training options (`patience`, `seed`, `lr0`, …), put beside the fields above.
    options: dict[str, Any] = Field(default_factory=dict)


class TrainQueued(Response):
    """A training was queued."""

    job_id: str
    status: Literal["queued"]
    #: Seconds, from earlier trainings of this type; null before the first.
    estimated_duration: float | None
    queue_position: int


class JobCancelled(Response):
    """What became of the wish to cancel."""

    job_id: str
    status: str


class TokenRequest(Request):
    """Asks for a token."""

    name: str = Field(min_length=1, max_length=100)
    abilities: list[Literal["worker", "admin", "edge"]] = Field(min_length=1)


class TokenMade(Response):
    """A new token, shown this once."""

    name: str
    token: str


class DatasetView(Response):
    """A data set that was stored."""

    dataset_id: int
    path: str
    sha256: str
    size_bytes: int


class WorkerWish(Request):
    """What an admin wants of a worker."""

    desired_state: Literal["run", "pause", "drain"]
