"""Everything that moves files for a job: data sets and models in, results and models out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rvmcv_worker import model_upload
from rvmcv_worker.config import Credentials, Settings
from rvmcv_worker.controller import Controller
from rvmcv_worker.downloads import Downloader, Fetched, OnBytes
from rvmcv_worker.errors import DatasetUnavailableError, JobError
from rvmcv_worker.https_files import HttpsFiles
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.model_upload import ModelUploader, UploadedModel
from rvmcv_worker.object_store import ObjectStore
from rvmcv_worker.retry import Retry
from rvmcv_worker.tally import Tally
from rvmcv_worker.transfer import MAX_REFUSALS
from rvmcv_worker.uploads import NoStorageError, Stored, Uploader

__all__ = ["Fetched", "NoStorageError", "OnBytes", "Storage", "Stored", "UploadedModel"]

#: How long storage that is away is waited for with a file, in seconds.
PATIENCE_S = 600.0
#: The same with a trained model: hours hang on it.
MODEL_PATIENCE_S = model_upload.PATIENCE_S


class Storage:
    """One for the whole daemon; every method may be called from several jobs' threads at once.

    Each of them repeats what may succeed later, and raises what the job's `interrupt` asks for.
    """

    def __init__(
        self,
        settings: Settings,
        credentials: Credentials,
        controller: Controller,
        retry: Retry | None = None,
        tally: Tally | None = None,
    ) -> None:
        retry, tally = retry or Retry(settings), tally or Tally()
        self._https = HttpsFiles(settings)
        self._objects = ObjectStore(settings, credentials) if settings.storage.s3_endpoint else None
        self._downloads = Downloader(settings, controller, retry, self._objects, self._https, tally)
        self._uploads = Uploader(settings, controller, retry, self._objects, self._https, tally)
        self._models = ModelUploader(settings, controller, retry, self._downloads, tally)

    @property
    def can_store(self) -> bool:
        """Whether `put_artifact` has somewhere to put; without, only `upload_model` delivers.

        Where there are no keys this asks RVM-Server whether it presigns, until it has said yes.
        """
        return self._uploads.can_store

    @property
    def lacking(self) -> bool:
        """Whether it is known that `put_artifact` has nowhere to put; asks nobody."""
        return self._uploads.lacking

    def fetch(
        self,
        url: str,
        dest: Path,
        *,
        max_bytes: int,
        sha256: str | None,
        interrupt: Interrupt,
        unavailable: type[JobError] = DatasetUnavailableError,
        on_bytes: OnBytes | None = None,
        max_refusals: int = MAX_REFUSALS,
    ) -> Fetched:
        """Bring the file that a job's URL names to `dest` (new, mode 0600); after an error it is gone.

        A place that answers that it does not have it, or does not give it, is asked `max_refusals` times.
        Raises `UrlForbiddenError`, `unavailable`, its *invalid* sister when the file is over
        `max_bytes`, and `ChecksumMismatchError`.
        """
        return self._downloads.fetch(
            url,
            dest,
            max_bytes=max_bytes,
            sha256=sha256,
            interrupt=interrupt,
            unavailable=unavailable,
            on_bytes=on_bytes,
            max_refusals=max_refusals,
        )

    def fetch_model(
        self,
        wanted: str,
        dest: Path,
        *,
        max_bytes: int,
        sha256: str | None,
        interrupt: Interrupt,
        on_bytes: OnBytes | None = None,
    ) -> Fetched:
        """Bring a model from RVM-Server, by name, version or hash, to `dest` (new, mode 0600).

        The hash of the bytes is compared with `sha256` or, without it, with what the server says.
        Raises `ModelUnavailableError`, `ModelInvalidError` (too large), `ChecksumMismatchError`.
        """
        return self._downloads.fetch_model(
            wanted, dest, max_bytes=max_bytes, sha256=sha256, interrupt=interrupt, on_bytes=on_bytes
        )

    def promised_model_sha256(self, wanted: str) -> str | None:
        """The sha256 that RVM-Server says a model has; None when it says nothing, for whatever reason."""
        return self._downloads.promised_model_sha256(wanted)

    def put_artifact(
        self,
        path: Path,
        name: str,
        *,
        job_id: str,
        attempt: int,
        lease_token: str,
        interrupt: Interrupt,
        patience_s: float = PATIENCE_S,
        sha256: str | None = None,
    ) -> Stored:
        """Put a file under the attempt's own key, so that a repetition does no harm.

        Its `sha256`, where it is known, saves a reading. The file must not change meanwhile.
        Raises `NoStorageError`, `UploadRejectedError` and, when storage was away for `patience_s`,
        `UploadFailedError`.
        """
        return self._uploads.put(
            path,
            name,
            job_id=job_id,
            attempt=attempt,
            lease_token=lease_token,
            interrupt=interrupt,
            patience_s=patience_s,
            sha256=sha256,
        )

    def upload_model(
        self,
        path: Path,
        *,
        model_name: str,
        version: str,
        metrics: Mapping[str, Any],
        training_job_id: int,
        lease_token: str,
        sha256: str,
        stored: Stored | None,
        interrupt: Interrupt,
    ) -> UploadedModel:
        """Register a model in RVM-Server, at most once, and wait for a server that is away.

        Raises `UploadRejectedError` (which names the gate), `UploadFailedError`,
        `ChecksumMismatchError`, `FencedError`.
        """
        return self._models.upload(
            path,
            model_name=model_name,
            version=version,
            metrics=metrics,
            training_job_id=training_job_id,
            lease_token=lease_token,
            sha256=sha256,
            stored=stored,
            interrupt=interrupt,
        )

    def check(self) -> tuple[bool, str]:
        """For `doctor`: is storage reachable, do the keys work; a sentence that says what to do."""
        if self._objects and self._objects.has_keys:
            return self._objects.check()
        return self._uploads.check_without_keys()

    def close(self) -> None:
        """Close the calling thread's connections and storage's."""
        self._https.close()
        if self._objects:
            self._objects.close()
