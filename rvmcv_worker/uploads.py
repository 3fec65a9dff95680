"""Puts a job's files into storage: with the worker's own keys, or into slots that RVM-Server presigned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from rvmcv_worker import protocol
from rvmcv_worker.config import Settings
from rvmcv_worker.controller import (
    Controller,
    ControllerError,
    NotFoundError,
    RequestRejectedError,
    TokenRejectedError,
)
from rvmcv_worker.errors import FencedError, UploadFailedError, UploadRejectedError
from rvmcv_worker.https_files import HttpsFiles
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.object_store import ObjectStore
from rvmcv_worker.retry import Retry
from rvmcv_worker.tally import Tally
from rvmcv_worker.transfer import BrokenError, RefusedError, TransferError, TryAgain, failed_call
from rvmcv_worker.urls import HttpsUrl, S3Url, classify, without_token

_HASH_BYTES = 1024 * 1024
#: Asked for to learn whether a server presigns; no job has this id.
PROBE_JOB_ID = "storage-probe"


class NoStorageError(UploadRejectedError):
    """No MinIO keys here and no job-uploads at RVM-Server: only `upload-model` can deliver."""


@dataclass(frozen=True)
class Stored:
    """A file that lies in storage."""

    path: str  #: ``s3://bucket/key``, or what the slot called it: the name to use in reports
    size_bytes: int
    sha256: str


class Uploader:
    """Puts one file at a time; every key holds job and attempt, so that a repetition does no harm."""

    def __init__(
        self,
        settings: Settings,
        controller: Controller,
        retry: Retry,
        objects: ObjectStore | None,
        https: HttpsFiles,
        tally: Tally,
    ) -> None:
        self._settings = settings
        self._controller = controller
        self._retry = retry
        self._objects = objects if objects and objects.has_keys else None
        self._https = https
        self._tally = tally
        #: Whether RVM-Server presigns; None before it has said so or not.
        self._has_slots: bool | None = None

    @property
    def can_store(self) -> bool:
        """See `Storage.can_store`."""
        if self._objects is None and not self._has_slots:
            self._ask_for_slots()
        return self._objects is not None or bool(self._has_slots)

    @property
    def lacking(self) -> bool:
        """See `Storage.lacking`."""
        return self._objects is None and self._has_slots is False

    def _ask_for_slots(self) -> None:
        """Ask for a slot of a job that does not exist: a server that presigns says just that."""
        nothing = protocol.UploadFile(name="probe", size=0, sha256=hashlib.sha256().hexdigest())
        try:
            self._controller.job_uploads(PROBE_JOB_ID, "none", [nothing])
        except (FencedError, RequestRejectedError):
            self._has_slots = True
        except NotFoundError:
            self._has_slots = False
        except ControllerError as error:
            logger.debug("whether RVM-Server presigns is not known: {}", error)

    def put(
        self,
        path: Path,
        name: str,
        *,
        job_id: str,
        attempt: int,
        lease_token: str,
        interrupt: Interrupt,
        patience_s: float,
        sha256: str | None,
    ) -> Stored:
        """See `Storage.put_artifact`."""
        size_bytes = path.stat().st_size
        if self._objects:
            target = S3Url(self._objects.bucket, f"cv/{job_id}/attempt-{attempt}/{name}")
            objects = self._objects

            def once() -> Stored:
                with path.open("rb") as source:
                    return Stored(str(target), size_bytes, objects.put(target, source, size_bytes, interrupt))

        else:  # a slot is asked for by its sha256
            declared = sha256 or hash_of(path, interrupt)
            file = protocol.UploadFile(name=name, size=size_bytes, sha256=declared)

            def once() -> Stored:
                slot = self._slot(job_id, lease_token, file)
                self._https.put(self._presigned(slot), path, size_bytes, interrupt)
                return Stored(slot.path, size_bytes, declared)

        again = TryAgain(self._retry, interrupt, patience_s=self._settings.scaled(patience_s))
        stored = _repeated(once, f"{name} ({size_bytes} bytes)", again)
        self._tally.stored("checkpoint" if name.startswith("checkpoint") else "artifact", size_bytes)
        return stored

    def check_without_keys(self) -> tuple[bool, str]:
        """For `doctor`, where there are no keys: that is a way to work, and what it needs."""
        needs = "set storage.s3_endpoint and put s3-access-key and s3-secret-key beside the token"
        if self.can_store:
            return (
                True,
                f"no MinIO keys: files go into slots that RVM-Server presigns (job-uploads); else {needs}",
            )
        return False, f"no MinIO keys, and no job-uploads at RVM-Server: only upload-model delivers; {needs}"

    def _slot(self, job_id: str, lease_token: str, file: protocol.UploadFile) -> protocol.UploadSlot:
        """Ask for a slot; a fresh one for each try, since the last may have expired.

        From a server that has given some, a 404 is that of a proxy before it: it is waited for, as is one
        that rejects the token.
        """
        try:
            slots = self._controller.job_uploads(job_id, lease_token, [file])
        except ControllerError as error:
            passing = isinstance(error, TokenRejectedError) or (
                self._has_slots and isinstance(error, NotFoundError)
            )
            if passing:
                raise BrokenError(str(error), status=error.status) from error
            raise failed_call(error) from error
        self._has_slots = True
        return slots[file.name]

    def _presigned(self, slot: protocol.UploadSlot) -> HttpsUrl:
        target = classify(slot.url, self._settings)
        if place := without_token(target, self._settings):
            return place
        raise UploadRejectedError(f"job-uploads offers {target}, which is no presigned URL of storage")


def _repeated(once: Callable[[], Stored], what: str, again: TryAgain) -> Stored:
    while True:
        try:
            return once()
        except TransferError as error:
            try:
                again.after(error)
            except TransferError as last:
                if isinstance(last, RefusedError) and isinstance(last.__cause__, NotFoundError):
                    raise NoStorageError(
                        f"{what} cannot be stored: no MinIO keys here, no job-uploads at RVM-Server ({last})"
                    ) from None
                if isinstance(last, RefusedError):
                    raise UploadRejectedError(f"{what} was refused: {last}") from None
                raise UploadFailedError(f"{what} could not be stored: {last}") from None


def hash_of(path: Path, interrupt: Interrupt) -> str:
    """Return the sha256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_BYTES):
            interrupt.check()
            digest.update(chunk)
    return digest.hexdigest()
