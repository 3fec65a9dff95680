"""Brings a file here: hashed while it streams, capped by what really came, resumed after a cut."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rvmcv_worker.answers import ControllerError
from rvmcv_worker.config import Settings
from rvmcv_worker.controller import Controller, Stream
from rvmcv_worker.errors import (
    ChecksumMismatchError,
    DatasetInvalidError,
    DatasetUnavailableError,
    ImageInvalidError,
    ImageUnavailableError,
    InternalError,
    JobError,
    ModelInvalidError,
    ModelUnavailableError,
    UrlForbiddenError,
)
from rvmcv_worker.https_files import HttpsFiles
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.object_store import ObjectStore
from rvmcv_worker.partial_file import PartialFile, new_file
from rvmcv_worker.retry import Retry
from rvmcv_worker.tally import Source as CountedAs
from rvmcv_worker.tally import Tally
from rvmcv_worker.transfer import (
    READ_BYTES,
    BrokenError,
    Opened,
    TransferError,
    TryAgain,
    failed_call,
    promised_sha256,
    strong_etag,
    watched,
)
from rvmcv_worker.urls import HttpsUrl, JobUrl, S3Url, ServerPath, classify, without_token

#: What must have come since the last try for it to count as progress.
PROGRESS_BYTES = 1024 * 1024
#: Called with the bytes that are here and those of the whole file, where that is known.
OnBytes = Callable[[int, int | None], None]
#: Opens the file from an offset on, if it still has the ETag.
Source = Callable[[int, str | None], contextlib.AbstractContextManager[Opened]]
_INVALID: dict[type[JobError], type[JobError]] = {
    DatasetUnavailableError: DatasetInvalidError,
    ImageUnavailableError: ImageInvalidError,
    ModelUnavailableError: ModelInvalidError,
}
_TODO: dict[type[JobError], str] = {
    DatasetUnavailableError: "check the data set's URL, and that it is still stored there",
    ImageUnavailableError: "check the image's URL, and that it is still stored there",
    ModelUnavailableError: "upload the model to RVM-Server, or name one that it has",
}


@dataclass(frozen=True)
class Fetched:
    """A file that is here, whole."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Wanted:
    """What is fetched, and what ends it."""

    what: str
    sha256: str | None
    max_bytes: int
    unavailable: type[JobError]
    counted_as: CountedAs

    def too_large(self, size_bytes: int, *, at_least: bool) -> JobError:
        """Return the error of a file over the cap."""
        invalid = _INVALID.get(self.unavailable, self.unavailable)
        return invalid(
            f"{self.what} has {'more than ' if at_least else ''}{size_bytes} bytes; this worker takes at most"
            f" {self.max_bytes}; make it smaller, or raise the limit in the worker's [limits]"
        )

    def not_to_be_had(self, error: TransferError) -> JobError:
        """Return the error of a file that the last try did not bring either."""
        todo = _TODO.get(self.unavailable, "check the URL")
        return self.unavailable(f"{error}; {todo}", retry_after_s=error.retry_after_s)


class Downloader:
    """Fetches by URLs of jobs, and models from RVM-Server."""

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
        self._objects = objects
        self._https = https
        self._tally = tally
        self._stall_s = settings.server.read_timeout_s

    def fetch(
        self,
        url: str,
        dest: Path,
        *,
        max_bytes: int,
        sha256: str | None,
        interrupt: Interrupt,
        unavailable: type[JobError],
        on_bytes: OnBytes | None,
        max_refusals: int,
    ) -> Fetched:
        """See `Storage.fetch`."""
        target = classify(url, self._settings)
        wanted = Wanted(str(target), sha256 and sha256.lower(), max_bytes, unavailable, _counted_as(target))
        again = TryAgain(self._retry, interrupt, max_refusals=max_refusals)
        return self._bring(self._source(target), wanted, dest, interrupt, on_bytes, again)

    def fetch_model(
        self,
        wanted: str,
        dest: Path,
        *,
        max_bytes: int,
        sha256: str | None,
        interrupt: Interrupt,
        on_bytes: OnBytes | None,
    ) -> Fetched:
        """See `Storage.fetch_model`."""
        if re.fullmatch(r"[0-9a-fA-F]{64}", wanted):
            sha256 = sha256 or wanted
        path = self._controller.model_path(wanted)
        model = Wanted(
            f"the model {wanted} on RVM-Server",
            sha256 and sha256.lower(),
            max_bytes,
            ModelUnavailableError,
            "server",
        )
        again = TryAgain(self._retry, interrupt)
        return self._bring(
            lambda offset, etag: self.open_model(path, offset, etag), model, dest, interrupt, on_bytes, again
        )

    def promised_model_sha256(self, wanted: str) -> str | None:
        """See `Storage.promised_model_sha256`."""
        try:
            with self._stream(self._controller.model_path(wanted), 0, None) as stream:
                return promised_sha256(stream.headers)
        except TransferError:
            return None

    def _source(self, target: JobUrl) -> Source:
        if isinstance(target, S3Url):
            objects = self._objects
            if objects is None:
                raise InternalError(f"{target} was allowed without storage.s3_endpoint")
            return lambda offset, _etag: objects.open(target, offset)
        if isinstance(target, HttpsUrl):
            return lambda offset, etag: self._https.open(target, offset, etag)
        return lambda offset, etag: self._open_on_server(target, offset, etag)

    @contextlib.contextmanager
    def _open_on_server(self, target: ServerPath, offset_bytes: int, etag: str | None) -> Iterator[Opened]:
        with self._stream(target.path, offset_bytes, etag) as stream:
            yield _opened(stream)

    @contextlib.contextmanager
    def open_model(self, path: str, offset_bytes: int, etag: str | None) -> Iterator[Opened]:
        """Open a model, following one redirect to an allowed host, without the token."""
        with self._stream(path, offset_bytes, etag) as stream:
            if stream.location is None:
                yield _opened(stream)
                return
            location, promised = stream.location, promised_sha256(stream.headers)
        target = classify(location, self._settings)
        place = without_token(target, self._settings)
        if place is None:
            raise UrlForbiddenError(
                f"download-model redirects to {target}; a redirect may lead to storage only"
            )
        with self._https.open(place, offset_bytes, etag) as answer:
            yield dataclasses.replace(answer, sha256=promised or answer.sha256)

    @contextlib.contextmanager
    def _stream(self, path: str, offset_bytes: int, etag: str | None) -> Iterator[Stream]:
        try:
            with self._controller.open_stream(path, offset=offset_bytes, if_range=etag) as stream:
                yield stream
        except ControllerError as error:
            raise failed_call(error) from error

    def _bring(
        self,
        source: Source,
        wanted: Wanted,
        dest: Path,
        interrupt: Interrupt,
        on_bytes: OnBytes | None,
        again: TryAgain,
    ) -> Fetched:
        mismatched: str | None = None
        with new_file(dest) as file:
            partial = PartialFile(file)
            best_bytes = 0
            while True:
                interrupt.check()
                try:
                    promised = self._pull(source, partial, wanted, interrupt, on_bytes)
                except TransferError as error:
                    if partial.done_bytes - best_bytes >= PROGRESS_BYTES:
                        best_bytes = partial.done_bytes
                        again.progressed()
                    if error.status == 416:  # the file has become shorter than what is here
                        partial.restart()
                    try:
                        again.after(error)
                    except TransferError as last:
                        raise wanted.not_to_be_had(last) from last
                    continue
                except OSError as error:  # of the disk: those of the network have become others by now
                    raise wanted.unavailable(
                        f"{wanted.what}: cannot be kept on the worker: {error.strerror}"
                    ) from None
                found = partial.digest.hexdigest()
                expected = wanted.sha256 or promised
                if expected in (None, found):
                    file.flush()
                    return Fetched(dest, partial.done_bytes, found)
                if mismatched is not None:
                    raise ChecksumMismatchError(
                        f"{wanted.what}: {partial.done_bytes} bytes came with sha256 {found}, twice"
                        f" not {expected}; compare the file there with the hash that was named"
                    )
                mismatched = found
                partial.restart()

    def _pull(
        self,
        source: Source,
        partial: PartialFile,
        wanted: Wanted,
        interrupt: Interrupt,
        on_bytes: OnBytes | None,
    ) -> str | None:
        """Read one answer to its end; returns the sha256 that its header promised."""
        # Without a sha256 at the end, bytes of two answers go together only under one strong ETag.
        if partial.done_bytes and not (partial.etag or wanted.sha256):
            partial.restart()
        with source(partial.done_bytes, partial.etag) as answer:
            if answer.start_bytes == 0:
                partial.restart()
                partial.etag, partial.total_bytes = answer.etag, answer.total_bytes
            elif not partial.goes_on_with(answer):
                partial.restart()
                raise BrokenError(f"{wanted.what}: it changed while it was fetched")
            if partial.total_bytes is not None and partial.total_bytes > wanted.max_bytes:
                raise wanted.too_large(partial.total_bytes, at_least=False)
            with watched(wanted.what, answer.cut, interrupt, self._stall_s, lambda: partial.done_bytes):
                self._copy(answer, partial, wanted, interrupt, on_bytes)
        if partial.total_bytes not in (None, partial.done_bytes):
            raise BrokenError(
                f"{wanted.what}: ended after {partial.done_bytes} of {partial.total_bytes} bytes"
            )
        return answer.sha256

    def _copy(
        self,
        answer: Opened,
        partial: PartialFile,
        wanted: Wanted,
        interrupt: Interrupt,
        on_bytes: OnBytes | None,
    ) -> None:
        for chunk in answer.chunks:
            interrupt.check()
            if partial.done_bytes + len(chunk) > wanted.max_bytes:
                raise wanted.too_large(wanted.max_bytes, at_least=True)
            partial.add(chunk)
            self._tally.fetched(wanted.counted_as, len(chunk))
            if on_bytes:
                on_bytes(partial.done_bytes, partial.total_bytes)


def _counted_as(target: JobUrl) -> CountedAs:
    if isinstance(target, S3Url):
        return "storage"
    return "https" if isinstance(target, HttpsUrl) else "server"


def _opened(stream: Stream) -> Opened:
    etag, sha256 = strong_etag(stream.headers), promised_sha256(stream.headers)
    return Opened(stream.chunks(READ_BYTES), stream.cut, stream.offset, stream.size_bytes, etag, sha256)
