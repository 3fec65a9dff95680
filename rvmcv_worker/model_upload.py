"""Registers a trained model in RVM-Server, at most once, whatever happens to the answers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker import protocol
from rvmcv_worker.config import Settings
from rvmcv_worker.controller import Controller, ControllerError, RequestRejectedError, TooLargeError
from rvmcv_worker.downloads import Downloader
from rvmcv_worker.errors import ChecksumMismatchError, UploadFailedError, UploadRejectedError
from rvmcv_worker.events import Event, event
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.retry import Retry
from rvmcv_worker.tally import Tally
from rvmcv_worker.transfer import BrokenError, RefusedError, TransferError, TryAgain, failed_call, watched
from rvmcv_worker.uploads import Stored

#: Answers of 5xx to POSTs, with the model not there after each, until it is taken for a refusal.
MAX_SERVER_ERRORS = 3
#: How long a server that is away or misrouted is waited for, in seconds: hours of training hang on it.
PATIENCE_S = 24 * 3600.0
#: What a server without the JSON form may answer to it: then the file itself is sent.
_NO_JSON = {400, 405, 406, 415, 422}


@dataclass(frozen=True)
class UploadedModel:
    """The model as RVM-Server has it; what only the answer to the POST tells is None when that was lost."""

    sha256_hash: str
    file_size_mb: float
    model_id: int | str | None = None
    file_path: str | None = None


@dataclass(frozen=True)
class _Model:
    file: Path
    size_bytes: int
    sha256: str
    upload: protocol.ModelUpload
    stored: Stored | None


class ModelUploader:
    """`POST upload-model` is not repeatable at every server: a look at the bytes goes before each."""

    def __init__(
        self, settings: Settings, controller: Controller, retry: Retry, downloads: Downloader, tally: Tally
    ) -> None:
        self._patience_s = settings.scaled(PATIENCE_S)
        self._stall_s = settings.server.read_timeout_s
        self._controller = controller
        self._retry = retry
        self._downloads = downloads
        self._tally = tally
        self._takes_json = True

    def upload(
        self,
        file: Path,
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
        """See `Storage.upload_model`.

        An object that already lies in storage is first named in JSON (`file_path`, `sha256_hash`): that
        moves no bytes twice and meets none of the gates before a file. A server that does not know
        the form refuses it before it has stored anything ("model_file required", 422), so that trying is
        safe; it is remembered, and the file is sent.
        """
        upload = protocol.ModelUpload(
            model_name=model_name,
            version=version,
            metrics=dict(metrics),
            training_job_id=training_job_id,
            lease_token=lease_token,
        )
        model = _Model(file, file.stat().st_size, sha256, upload, stored)
        again = TryAgain(self._retry, interrupt, patience_s=self._patience_s)
        server_errors = 0
        while True:
            interrupt.check()
            try:
                if self._is_there(model, interrupt):
                    event(Event.MODEL_UPLOADED).info(
                        "RVM-Server has model {} already, byte for byte", version
                    )
                    return UploadedModel(sha256, round(model.size_bytes / 2**20, 2))
                if server_errors >= MAX_SERVER_ERRORS:
                    raise UploadRejectedError(
                        f"upload-model of {version} ({model.size_bytes} bytes) was answered with 5xx"
                        f" {server_errors} times and the model is not there; see RVM-Server's log"
                    )
                return self._post(model)
            except ControllerError as error:
                if isinstance(error, (RequestRejectedError, TooLargeError)):
                    raise UploadRejectedError(
                        f"the model {version} ({model.size_bytes} bytes): {error}"
                    ) from None
                server_errors += (error.status or 0) >= 500
                if server_errors == MAX_SERVER_ERRORS - 1:  # perhaps the JSON form is what it stumbles over
                    model = dataclasses.replace(model, stored=None)
                self._wait(again, failed_call(error), version, error)
            except TransferError as error:
                self._wait(again, error, version, error.__cause__)

    def _wait(self, again: TryAgain, error: TransferError, version: str, cause: BaseException | None) -> None:
        """Wait with a model, also where a proxy says 404 to everything or the token was rejected."""
        event(Event.MODEL_UPLOAD_WAITS).warning(
            "model {} waits: {}; nothing to do unless it stays so", version, error
        )
        waiting = BrokenError(str(error), status=error.status, retry_after_s=error.retry_after_s)
        waiting.__cause__ = cause
        try:
            again.after(waiting)
        except TransferError as last:
            raise UploadFailedError(f"the model {version} could not be delivered: {last}") from None

    def _is_there(self, model: _Model, interrupt: Interrupt) -> bool:
        """Whether RVM-Server has a model of this sha256 with these bytes; raises `TransferError`."""
        digest, done_bytes = hashlib.sha256(), 0
        try:
            with (
                self._downloads.open_model(self._controller.model_path(model.sha256), 0, None) as answer,
                watched("download-model", answer.cut, interrupt, self._stall_s, lambda: done_bytes),
            ):
                for chunk in answer.chunks:
                    interrupt.check()
                    digest.update(chunk)
                    done_bytes += len(chunk)
                    if done_bytes > model.size_bytes:
                        break
        except RefusedError as error:
            if error.status == 404:
                return False
            raise
        if digest.hexdigest() == model.sha256:
            return True
        raise UploadRejectedError(
            f"RVM-Server answers download-model/{model.sha256} with other bytes ({done_bytes} or more,"
            f" instead of {model.size_bytes}): a file there was overwritten; remove that row and its file,"
            " then train again"
        )

    def _post(self, model: _Model) -> UploadedModel:
        answer = self._post_stored(model)
        if answer is None:
            answer = self._controller.upload_model(model.upload, model.file)
            self._tally.stored("model", model.size_bytes)
        if answer.sha256_hash != model.sha256:
            raise ChecksumMismatchError(
                f"RVM-Server stored {model.upload.version} with sha256 {answer.sha256_hash},"
                f" not {model.sha256}: the bytes changed on their way"
            )
        size_mb = answer.file_size_mb or round(model.size_bytes / 2**20, 2)
        event(Event.MODEL_UPLOADED).info("RVM-Server has model {}, {} MB", model.upload.version, size_mb)
        return UploadedModel(answer.sha256_hash, size_mb, answer.model_id, answer.file_path)

    def _post_stored(self, model: _Model) -> protocol.UploadedModel | None:
        """Name the object in storage; None when there is none or the server wants the file."""
        if model.stored is None or not self._takes_json:
            return None
        fields = model.upload.model_dump()
        named = protocol.StoredModelUpload(**fields, file_path=model.stored.path, sha256_hash=model.sha256)
        try:
            return self._controller.register_model(named)
        except ControllerError as error:
            if error.status not in _NO_JSON:
                raise
            # Another refusal may concern this model alone; the multipart form then gets its own answer.
            if error.status != 422 or "model_file" in str(error):
                self._takes_json = False
            event(Event.MODEL_SENT_AS_FILE).info(
                "RVM-Server does not take a model by its path ({}): the file is sent", error
            )
            return None
