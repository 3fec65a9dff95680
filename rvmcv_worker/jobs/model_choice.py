"""Which models a job is answered by, and in which engine: they are in the store when this returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rvmcv_worker.engine_client import Ask
from rvmcv_worker.engine_wire import Queue, Trust
from rvmcv_worker.jobs.inference_config import OWN_MASKS, InferenceOptions

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt

#: What RVM-Server is asked for where a job names no model.
ACTIVE = "active"
_MB = 1024**2


@dataclass(frozen=True)
class Chosen:
    """The models of a job, all of them in the store."""

    trust: Trust
    model_sha256: str
    #: The detector as the job called it, for the result; its sha256 where that was "active" or nothing.
    model_used: str
    #: None: no masks, or the detector's own.
    segmenter_sha256: str | None = None
    #: What makes the masks, as the job or the configuration called it; None without masks.
    segmenter_used: str | None = None

    def ask(self, config: InferenceOptions, queue: Queue) -> Ask:
        """Return what the engine is to be asked about each image."""
        return Ask(
            trust=self.trust,
            queue=queue,
            model_sha256=self.model_sha256,
            segmenter_sha256=self.segmenter_sha256,
            options=config.options(),
        )

    def told(self) -> dict[str, str]:
        """Return what the result says of the models."""
        told = {"model_used": self.model_used, "model_sha256": self.model_sha256}
        return {**told, "segmenter_used": self.segmenter_used} if self.segmenter_used else told


def choose(attempt: Attempt, config: InferenceOptions) -> Chosen:
    """Have a job's models in the store.

    A hash is enough: a model that is here costs no request then. Raises `JobError`.
    """
    wanted = config.model_version or config.model_sha256 or ACTIVE
    model_sha256 = _fetch(attempt, wanted, config.model_sha256)
    approved = config.model_active
    segmenter, segmenter_sha256 = None, None
    settings = attempt.services.settings
    if config.segmentation:
        segmenter = config.segmenter or settings.inference.segmenter
        if segmenter != OWN_MASKS:
            segmenter_sha256 = _fetch(attempt, segmenter, config.segmenter_sha256)
            # A name alone says nothing: whoever may upload to RVM-Server gives it to what he likes.
            pinned = segmenter_sha256 in settings.models.pinned.values()
            approved = approved and (pinned or config.segmenter_active)
    return Chosen(
        trust=Trust.APPROVED if approved else Trust.OTHER,
        model_sha256=model_sha256,
        model_used=model_sha256 if wanted == ACTIVE else wanted,
        segmenter_sha256=segmenter_sha256,
        segmenter_used=segmenter,
    )


def _fetch(attempt: Attempt, wanted: str, sha256: str | None) -> str:
    services = attempt.services
    return services.model_store.fetch_base_model(
        wanted,
        expected_sha256=sha256,
        storage=services.storage,
        max_bytes=int(services.settings.limits.max_model_mb * _MB),
        interrupt=attempt.interrupt,
    )
