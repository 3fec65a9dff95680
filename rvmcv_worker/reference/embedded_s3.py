"""An S3 store in this process: moto's server behind a check of every signature.

moto keeps its objects in memory, one set per process; what was stored through this server is
kept in a folder too, so that it outlives a restart.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

from rvmcv_worker.reference.s3_signature import SignatureCheck, SignatureError, SignedRequest

StartResponse = Callable[..., Any]
#: Bodies above this size are kept on disk while they are hashed.
SPOOL_BYTES = 8 * 2**20


class EmbeddedS3:
    """Listens on a port of 127.0.0.1 from its making until `stop`."""

    def __init__(
        self,
        folder: Path,
        *,
        access_key: str | None = None,
        secret_key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.access_key = access_key or secrets.token_hex(10)
        self.secret_key = secret_key or secrets.token_hex(20)
        self._clock = clock
        self._check = SignatureCheck(self.access_key, self.secret_key)
        self._mirror = _Mirror(folder)
        self._moto = create_backend_app("s3")
        self._server = make_server(host, port, self._serve, threaded=True, request_handler=_QuietHandler)
        self.endpoint = f"http://{host}:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="embedded-s3", daemon=True)
        self._mirror.load()
        self._thread.start()

    def stop(self) -> None:
        """Close the port and drop the objects from memory; the folder keeps them."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._mirror.forget()

    def _serve(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        request = _request_of(environ)
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as body:
            try:
                self._check.check(request, self._clock())
                _receive(environ, request.headers, body)
            except SignatureError as error:
                return _refuse(error, start_response)
            return self._pass_on({**environ, "wsgi.input": body}, start_response)

    def _pass_on(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        statuses: list[str] = []

        def note_status(status: str, *rest: Any) -> Any:
            statuses.append(status)
            return start_response(status, *rest)

        answer = list(self._moto(environ, note_status))
        if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE") and statuses[0].startswith("2"):
            # WSGI hands paths over as if they were Latin-1.
            self._mirror.update(environ["PATH_INFO"].encode("latin-1").decode())
        return answer


def _request_of(environ: dict[str, Any]) -> SignedRequest:
    headers = {
        key[5:].lower().replace("_", "-"): value for key, value in environ.items() if key.startswith("HTTP_")
    }
    for key in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(key):
            headers[key.lower().replace("_", "-")] = environ[key]
    url = f"http://{headers.get('host', '')}{environ['RAW_URI']}"
    return SignedRequest(environ["REQUEST_METHOD"], url, headers)


def _receive(environ: dict[str, Any], headers: dict[str, str], body: IO[bytes]) -> None:
    """Fill `body`, and refuse it when it is not what its signed digest says."""
    digest = hashlib.sha256()
    left = int(headers.get("content-length", 0))
    while left and (chunk := environ["wsgi.input"].read(min(left, 2**20))):
        body.write(chunk)
        digest.update(chunk)
        left -= len(chunk)
    if left:
        raise SignatureError("IncompleteBody", "the body ended before its Content-Length")
    wanted = headers.get("x-amz-content-sha256", "")
    if len(wanted) == 64 and wanted != digest.hexdigest():
        raise SignatureError("XAmzContentSHA256Mismatch", "the body does not have the signed sha256")
    body.seek(0)


def _refuse(error: SignatureError, start_response: StartResponse) -> Iterable[bytes]:
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f"<Error><Code>{error.code}</Code><Message>{escape(error.message)}</Message></Error>"
    ).encode()
    headers = [
        ("Content-Type", "application/xml"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    start_response("403 Forbidden", headers)
    return [body]


class _QuietHandler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002 - werkzeug's name
        """Say nothing: presigned URLs are secrets."""


class _Mirror:
    """Files of one folder, one per object: ``<bucket>/<quoted key>``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        self._lock = threading.Lock()

    def load(self) -> None:
        """Put every file of the folder into moto."""
        for file in self._folder.glob("*/*[!~]"):
            if file.parent.name not in self._backend.buckets:
                self._backend.create_bucket(file.parent.name, "us-east-1")
            self._backend.put_object(file.parent.name, unquote(file.name), file.read_bytes())

    def update(self, path: str) -> None:
        """Make the files of one object (``/bucket/key``), or of a bucket, what moto now holds."""
        bucket, _, key = path.lstrip("/").partition("/")
        folder = self._folder / bucket
        with self._lock:
            for name in [quote(key, safe="")] if key else [file.name for file in folder.glob("*")]:
                self._update_file(folder / name)

    def _update_file(self, file: Path) -> None:
        held = self._backend.get_object(file.parent.name, unquote(file.name))
        if held is None:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + "~")
        part.write_bytes(held.value)
        part.replace(file)

    def forget(self) -> None:
        """Take this folder's objects out of moto's memory."""
        for file in self._folder.glob("*/*"):
            self._backend.delete_object(file.parent.name, unquote(file.name))
