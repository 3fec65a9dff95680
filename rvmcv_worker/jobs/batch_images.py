"""One image of a batch, from its URL to what became of it; called by many threads at once."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rvmcv_worker.answers import TokenRejectedError
from rvmcv_worker.engine_client import Ask, InferResult
from rvmcv_worker.errors import ImageUnavailableError, InvalidJobError, JobError, ModelInvalidError
from rvmcv_worker.http_session import ended_by
from rvmcv_worker.manifest import Entry, Listed
from rvmcv_worker.transfer import RefusedError

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt

_MB = 1024**2
#: An image that a place says it does not have, or does not give: that is asked once.
_REFUSALS = 1
#: What would meet every other image too: it ends the job.
_OF_THE_JOB = frozenset(
    {
        "model_invalid",
        "model_unavailable",
        "unsupported_job",
        "upload_failed",
        "upload_rejected",
        "worker_unfit",
        "worker_stopped",
    }
)
#: What an image is at fault for, and no other image need fear.
_OF_THE_IMAGE = frozenset({"image_invalid", "url_forbidden", "checksum_mismatch"})


@dataclass(frozen=True)
class Outcome:
    """What became of one image of the list."""

    entry: Entry
    result: InferResult | None = None
    #: Where the drawn picture lies, if one was asked for.
    picture_path: str | None = None
    error: JobError | None = None
    #: Whether the fault may be that of a place or an engine that others need too.
    suspicious: bool = False


class BatchImages:
    """Fetches at most `download_threads` at once, and has at most `asked_at_once` at the engine."""

    def __init__(self, attempt: Attempt, ask: Ask, *, asked_at_once: int) -> None:
        inference = attempt.services.settings.inference
        self._attempt = attempt
        self._ask = ask
        self._max_bytes = int(inference.max_image_mb * _MB)
        self._fetching = threading.BoundedSemaphore(inference.download_threads)
        self._asking = threading.BoundedSemaphore(asked_at_once)
        #: Set when the model has answered: where it fails at an image later, the others need not end with it.
        self._model_answers = threading.Event()
        #: How many threads keep both busy.
        self.threads = inference.download_threads + asked_at_once

    def outcome(self, entry: Entry) -> Outcome:
        """Return what became of an image; raises what ends the job, and what its interrupt asks for."""
        if entry.listed is None:
            return Outcome(entry, error=InvalidJobError(entry.fault or ""))
        try:
            return self._through(entry, entry.listed)
        except JobError as error:
            self._attempt.interrupt.check()
            if error.code in _OF_THE_JOB and not (
                isinstance(error, ModelInvalidError) and self._model_answers.is_set()
            ):
                raise
            return Outcome(entry, error=error, suspicious=not _is_of_the_image(error))

    def _through(self, entry: Entry, listed: Listed) -> Outcome:
        attempt = self._attempt
        path = attempt.workspace.in_dir / f"image-{entry.index}"
        with self._fetching, ended_by(attempt.interrupt):
            attempt.interrupt.check()
            attempt.services.storage.fetch(
                listed.url,
                path,
                max_bytes=self._max_bytes,
                sha256=listed.sha256,
                interrupt=attempt.interrupt,
                unavailable=ImageUnavailableError,
                max_refusals=_REFUSALS,
            )
        with (
            self._asking
        ):  # until then it waits on the disk: few images are in memory, however large they are
            attempt.interrupt.check()
            image = path.read_bytes()
            path.unlink()
            result = attempt.services.engines.infer(self._ask, image, interrupt=attempt.interrupt)
        self._model_answers.set()
        if result.picture is None:
            return Outcome(entry, result)
        drawn = attempt.workspace.out_dir / f"annotated-{entry.index:07d}.jpg"
        drawn.write_bytes(result.picture)
        stored = attempt.store(drawn, drawn.name)
        drawn.unlink()
        return Outcome(entry, InferResult(result.result), picture_path=stored.path)


def _is_of_the_image(error: JobError) -> bool:
    """Whether a place or an engine has looked at the image and found fault with it."""
    why = error.__cause__
    refused = isinstance(why, RefusedError) and not isinstance(why.__cause__, TokenRejectedError)
    return refused or error.code in _OF_THE_IMAGE
