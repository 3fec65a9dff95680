"""Files on listed hosts, and presigned slots in storage: requests without the token."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from rvmcv_worker.answers import AddressForbiddenError, ControllerError
from rvmcv_worker.config import Settings
from rvmcv_worker.errors import UrlForbiddenError
from rvmcv_worker.http_session import Exchange, HttpSessions, Reply
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.transfer import (
    READ_BYTES,
    BrokenError,
    Opened,
    TransferError,
    extent,
    failed_call,
    promised_sha256,
    refusal,
    strong_etag,
    watched,
)
from rvmcv_worker.urls import HttpsUrl, addresses

#: Slowest upload that is waited for.
_UPLOAD_BYTES_PER_S = 256 * 1024
#: How much of an error's body is read.
_ERROR_BYTES = 64 * 1024


class HttpsFiles:
    """Gets and puts by URLs that `urls.classify` has allowed. Safe for several threads."""

    def __init__(self, settings: Settings) -> None:
        server = settings.server
        # The configured proxy stands before RVM-Server, not before storage.
        reach = functools.partial(addresses, settings=settings)
        self._http = HttpSessions(server.model_copy(update={"proxy": None}), reach)
        self._connect_s, self._read_s = server.connect_timeout_s, server.read_timeout_s

    @contextlib.contextmanager
    def open(self, target: HttpsUrl, offset_bytes: int, etag: str | None) -> Iterator[Opened]:
        """Open a file from `offset_bytes` on, if it has `etag` still; raises a `TransferError`."""
        headers = {"Accept": "*/*"}
        if offset_bytes:
            headers["Range"] = f"bytes={offset_bytes}-"
            if etag:
                headers["If-Range"] = etag
        exchange = Exchange(f"GET {target}", self._connect_s + self._read_s)
        with self._send(exchange, "GET", target, headers) as reply:
            if reply.status not in {200, 206}:
                raise refusal(str(target), reply.status, reply.headers, _start_of(reply))
            if reply.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise BrokenError(f"{target}: came compressed, though that was not asked for")
            start, total = extent(str(target), reply.status, reply.headers)
            sha256, strong = promised_sha256(reply.headers), strong_etag(reply.headers)
            reply.take_time()
            yield Opened(_chunks(reply), reply.cut, start, total, strong, sha256)

    def put(self, target: HttpsUrl, path: Path, size_bytes: int, interrupt: Interrupt) -> None:
        """Put a file into a presigned slot; raises a `TransferError`, and what `interrupt` asks for."""
        limit_s = self._read_s + size_bytes / _UPLOAD_BYTES_PER_S
        exchange = Exchange(f"PUT {target}", limit_s)
        headers = {"Content-Type": "application/octet-stream"}
        with path.open("rb") as source, watched(str(target), exchange.cut, interrupt, self._read_s):
            try:
                data = _Sized(source, size_bytes) if size_bytes else b""
                with self._send(exchange, "PUT", target, headers, data) as reply:
                    if not 200 <= reply.status < 300:
                        raise refusal(str(target), reply.status, reply.headers, _start_of(reply))
                    reply.read(_ERROR_BYTES)
            except TransferError:
                interrupt.check()
                raise

    def close(self) -> None:
        """Close the calling thread's connections; those of other threads end with them."""
        self._http.close()

    def _send(
        self,
        exchange: Exchange,
        method: str,
        target: HttpsUrl,
        headers: Mapping[str, str],
        data: _Sized | bytes | None = None,
    ) -> Reply:
        # The time-out for connecting is that of each write too.
        connect_s = self._connect_s if data is None else max(self._connect_s, self._read_s)
        try:
            return self._http.send(
                exchange, method, target.url, headers=headers, timeouts_s=(connect_s, self._read_s), data=data
            )
        except AddressForbiddenError as error:
            raise UrlForbiddenError(str(error)) from None
        except ControllerError as error:
            raise failed_call(error) from error


class _Sized:
    """A file whose length `requests` can see, and then does not send in chunks, which S3 does not take."""

    def __init__(self, source: BinaryIO, size_bytes: int) -> None:
        self._source = source
        self._size_bytes = size_bytes

    def __len__(self) -> int:
        return self._size_bytes

    def read(self, size: int = -1) -> bytes:
        """Read as the file does."""
        return self._source.read(size)


def _chunks(reply: Reply) -> Iterator[bytes]:
    try:
        yield from reply.chunks(READ_BYTES)
    except ControllerError as error:
        raise failed_call(error) from error


def _start_of(reply: Reply) -> bytes:
    """Return an error's body; it only adds words to the status, so that a broken one is none."""
    with contextlib.suppress(ControllerError):
        return reply.read(_ERROR_BYTES) or b""
    return b""
