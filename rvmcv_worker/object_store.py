"""Object storage by the worker's own keys: MinIO's client on a connection pool that we control."""

from __future__ import annotations

import contextlib
import io
import ssl
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

import certifi
import urllib3
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from rvmcv_worker.addresses import named_addresses
from rvmcv_worker.answers import excerpt, failure_of
from rvmcv_worker.checked_connections import pool_classes
from rvmcv_worker.config import Credentials, Settings
from rvmcv_worker.http_session import pieces
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.protocol import MAX_ANSWER_BYTES
from rvmcv_worker.read_ahead import ReadAhead
from rvmcv_worker.transfer import (
    READ_BYTES,
    BrokenError,
    Opened,
    RefusedError,
    TransferError,
    extent,
    refusal,
    strong_etag,
)
from rvmcv_worker.urls import S3Url

#: MinIO's client holds a whole part in memory, and the daemon shall stay small. A larger object goes
#: up in parts, of which S3 takes 10,000: 78 GiB.
PART_BYTES = 8 * 1024 * 1024
#: How long an answer other than an object may take from its first byte, in seconds: S3 drips blanks while it
#: joins the parts of a large object.
_ANSWER_LIMIT_S = 300.0
#: What `check` puts, again and again, to see that it may.
PROBE_KEY = "cv/doctor-probe"
_FAULTS = (MinioException, HTTPError, OSError, ValueError, ET.ParseError)
_KEYS_HINT = "check the files s3-access-key and s3-secret-key, and that key's rights"
_CLOCK_HINT = "this machine's clock is off; set it (timedatectl)"


class _Pool(urllib3.PoolManager):
    """Bounds what MinIO's client reads whole, which is every answer but an object's bytes."""

    def urlopen(  # type: ignore[override]
        self, method: str, url: str, *, preload_content: bool = True, **options: Any
    ) -> BaseHTTPResponse:
        response = super().urlopen(method, url, preload_content=False, **options)
        if not preload_content and response.status in {200, 204, 206}:
            return response
        whole = False
        try:
            body = _bounded(response)
            whole = True
        finally:
            if not whole:
                response.close()
            response.release_conn()
        return urllib3.HTTPResponse(
            io.BytesIO(body),
            headers=response.headers,
            status=response.status,
            reason=response.reason,
            preload_content=preload_content,
        )


def _bounded(response: BaseHTTPResponse) -> bytes:
    body = bytearray()
    until_s = time.monotonic() + _ANSWER_LIMIT_S
    for piece in pieces(response, READ_BYTES):
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise HTTPError(f"an answer of over {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > until_s:
            raise TimeoutError("the answer does not end")
    return bytes(body)


class ObjectStore:
    """An S3 endpoint and, where the operator gave them, keys for it. Safe for several threads."""

    def __init__(self, settings: Settings, credentials: Credentials) -> None:
        endpoint = settings.storage.s3_endpoint
        if endpoint is None:
            raise ValueError("storage.s3_endpoint is not set")
        parts = urlsplit(endpoint)
        access, secret = credentials.s3_access_key, credentials.s3_secret_key
        self.endpoint = endpoint
        self.bucket = settings.storage.s3_bucket
        self.has_keys = access is not None and secret is not None
        self._stall_s = settings.server.read_timeout_s
        # No retries and no redirects here: both are decided where the whole transfer is seen.
        self._pool = _Pool(
            maxsize=8,
            retries=urllib3.Retry(total=False),
            timeout=urllib3.Timeout(connect=settings.server.connect_timeout_s, read=self._stall_s),
            cert_reqs=ssl.CERT_REQUIRED,
            ca_certs=str(settings.server.ca_file or certifi.where()),
        )
        self._pool.pool_classes_by_scheme = pool_classes(named_addresses)
        # Without a region of our own the client asks for each bucket's before its first use.
        self._client = Minio(
            parts.netloc,
            access_key=access.get_secret_value() if access and secret else None,
            secret_key=secret.get_secret_value() if access and secret else None,
            secure=parts.scheme == "https",
            region=settings.storage.s3_region,
            http_client=self._pool,
        )

    @contextlib.contextmanager
    def open(self, target: S3Url, offset_bytes: int) -> Iterator[Opened]:
        """Open an object from `offset_bytes` on; raises a `TransferError`."""
        what = f"{target} at {self.endpoint}"
        try:
            body = self._client.get_object(target.bucket, target.key, offset=offset_bytes)
        except _FAULTS as error:
            raise self._failure(what, error) from None
        try:
            start, total = extent(what, body.status, body.headers)
            chunks = self._chunks(what, body)
            yield Opened(chunks, lambda: _shut_down(body), start, total, strong_etag(body.headers))
        finally:
            body.close()  # what was not read is not wanted
            body.release_conn()

    def _chunks(self, what: str, body: BaseHTTPResponse) -> Iterator[bytes]:
        try:
            yield from pieces(body, READ_BYTES)
        except _FAULTS as error:
            raise self._failure(what, error) from None

    def put(self, target: S3Url, source: BinaryIO, size_bytes: int, interrupt: Interrupt) -> str:
        """Put an object, whole or not at all; returns the sha256 of what was sent.

        Raises a `TransferError`, and what `interrupt` asks for.
        """
        with ReadAhead(source, size_bytes, PART_BYTES, interrupt) as ahead:
            try:
                self._client.put_object(
                    target.bucket,
                    target.key,
                    cast("BinaryIO", ahead),
                    size_bytes,
                    part_size=PART_BYTES,
                    num_parallel_uploads=1,
                )
            except _FAULTS as error:
                # The clean-up of an interrupted upload can fail too, and then hides why it ended.
                interrupt.check()
                raise self._failure(f"{target} at {self.endpoint}", error) from None
            return ahead.sha256()

    def check(self) -> tuple[bool, str]:
        """Put an empty object where results go; returns whether that worked, and a sentence for people."""
        what = f"bucket {self.bucket} at {self.endpoint}"
        try:
            self._client.put_object(self.bucket, PROBE_KEY, io.BytesIO(b""), 0)
        except S3Error as error:
            if error.code == "NoSuchBucket":
                return (
                    False,
                    f"{self.endpoint} has no bucket {self.bucket}: create it, or set storage.s3_bucket",
                )
            return False, str(self._failure(what, error))
        except _FAULTS as error:
            return False, f"{self._failure(what, error)}; check storage.s3_endpoint and the network"
        return True, f"{what} takes what this worker's keys put"

    def close(self) -> None:
        """Close every connection."""
        self._pool.clear()

    def _failure(self, what: str, error: Exception) -> TransferError:
        if isinstance(error, S3Error):
            return _s3_failure(what, error)
        if isinstance(error, ServerError):
            return refusal(what, error.status_code, {})
        if isinstance(error, InvalidResponseError):
            # Not S3 at all, or a proxy before it.
            status = error._code  # noqa: SLF001 - it keeps the status to itself
            found = refusal(what, status, {})
            return type(found)(f"{found}; is this really an S3 endpoint?", status=status)
        if isinstance(error, (ET.ParseError, UnicodeDecodeError)):
            return BrokenError(f"{what}: the answer is not XML; is this really an S3 endpoint?")
        if isinstance(error, ValueError):
            return RefusedError(f"{what}: {error}")
        return BrokenError(str(failure_of(what, error, limit_s=self._stall_s)))


def _s3_failure(what: str, error: S3Error) -> TransferError:
    status = error.response.status
    says = f"{what}: {excerpt(f'{error.code}: {error.message}'.encode())}"
    if error.code in {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}:
        return RefusedError(f"{says}; {_KEYS_HINT}", status=status)
    if error.code == "RequestTimeTooSkewed":
        return RefusedError(f"{says}; {_CLOCK_HINT}", status=status)
    found = refusal(what, status, error.response.headers)
    return type(found)(says, status=status, retry_after_s=found.retry_after_s)


def _shut_down(body: BaseHTTPResponse) -> None:
    # Read to its end, or handed back already: then nobody waits in it.
    with contextlib.suppress(ValueError, RuntimeError, OSError):
        body.shutdown()
