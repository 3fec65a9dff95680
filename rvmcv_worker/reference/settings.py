"""What the server can be told, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Gate(str, Enum):
    """A check in front of today's RVM-Server that refuses a checkpoint."""

    #: nginx without ``client_max_body_size``: an HTML 413 above 1 MB.
    NGINX = "nginx"
    #: PHP's ``upload_max_filesize`` (2 MB, a 422) and ``post_max_size`` (8 MB, a 413).
    PHP = "php"
    #: The rule ``mimes:pt,onnx``, which looks at the content: a ``.pt`` is a zip, so 422.
    MIMES = "mimes"


@dataclass(frozen=True)
class Timing:
    """Every duration of the server's, in seconds."""

    lease_train_s: float = 900.0
    lease_infer_s: float = 60.0
    report_interval_s: float = 2.0
    #: Worker-status intervals that workers are told.
    status_idle_s: float = 10.0
    status_busy_s: float = 3.0
    #: How long an offer keeps a job from being offered to another worker.
    offer_hold_s: float = 3.0
    #: Waiting for this long is worth one step of priority.
    ageing_s: float = 600.0
    #: Half of the second that a lost lease may go unnoticed.
    reap_every_s: float = 0.5
    #: First delay after a hand-back that names none; doubles with each, up to the limit.
    hand_back_delay_s: float = 10.0
    hand_back_delay_limit_s: float = 3600.0
    presigned_s: float = 3600.0
    #: First delay after a webhook that did not arrive; doubles with each, up to the limit, for so long.
    webhook_delay_s: float = 1.0
    webhook_delay_limit_s: float = 3600.0
    webhook_give_up_s: float = 86_400.0
    webhook_timeout_s: float = 10.0


@dataclass(frozen=True)
class Settings:
    """How this server behaves; the defaults are what a production server should do."""

    timing: Timing = field(default_factory=Timing)
    #: Expired leases, crashes and dead workers after which a job is failed as poisoned.
    poison_limit: int = 3
    #: Other hand-backs after which a job is failed.
    hand_back_limit: int = 10
    #: Activate a better model at its finish; see ``activation.py`` for the conditions.
    auto_activate: bool = False
    #: Answer ``download-model`` with a 302 to a presigned URL instead of the bytes.
    redirect_downloads: bool = False
    #: Behave like today's RVM-Server where that is at fault.
    as_today: bool = False
    #: Gates in front of ``upload-model``; each can be chosen alone.
    gates: frozenset[Gate] = frozenset()
    #: A batch of more images is cut into jobs of so many.
    shard_size: int = 10_000
    batch_limit_images: int = 1_000_000
    #: Requests with ``wait`` that are held at once, each an open connection; further ones are answered 202.
    held_answers_limit: int = 100
    #: Status intervals (idle) without a word after which a worker is silent.
    silent_intervals: int = 6
    #: Where alerts are POSTed to; None for nowhere.
    webhook_url: str | None = None
    #: Signs what is POSTed there; None leaves it unsigned.
    webhook_secret: str | None = field(default=None, repr=False)
    json_limit_bytes: int = 8 * 2**20
    report_limit_bytes: int = 512 * 1024
    upload_limit_bytes: int = 200 * 2**20
    dataset_limit_bytes: int = 4 * 2**30
    #: Of one uploaded image, with its form.
    image_limit_bytes: int = 64 * 2**20
    #: Of a batch's list, in storage or uploaded.
    manifest_limit_bytes: int = 2**30
