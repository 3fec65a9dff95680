"""RVM-Server's API, one method per call of the protocol, one try per call.

What an answer means is decided in `answers`, when to try again in `retry`. Methods may be called
from any thread. Next to the exceptions of `answers`, a call that writes raises `FencedError`.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from rvmcv_worker import protocol
from rvmcv_worker.addresses import named_addresses
from rvmcv_worker.answers import (
    ControllerError,
    NotFoundError,
    PollAbandonedError,
    ProtocolMissingError,
    RateLimitedError,
    RedirectRefusedError,
    RequestRejectedError,
    ServerUnavailableError,
    TokenRejectedError,
    TooLargeError,
    error_of,
    retry_after_s,
)
from rvmcv_worker.config import Settings
from rvmcv_worker.errors import FencedError, UrlForbiddenError
from rvmcv_worker.http_session import Exchange, HttpSessions, Reply
from rvmcv_worker.multipart import MultipartBody
from rvmcv_worker.tally import Call, Tally
from rvmcv_worker.token_source import TokenSource

__all__ = [
    "Controller",
    "ControllerError",
    "NotFoundError",
    "Offers",
    "PollAbandonedError",
    "ProtocolMissingError",
    "RateLimitedError",
    "RedirectRefusedError",
    "RequestRejectedError",
    "ServerUnavailableError",
    "Stream",
    "TokenRejectedError",
    "TooLargeError",
]

#: How long past its `wait` an answer to a poll is waited for, in seconds, at most.
_POLL_GRACE_S = 10.0
#: The slowest upload that is waited for, in bytes a second.
_UPLOAD_BYTES_PER_S = 256 * 1024
_JSON = "application/json"


@dataclass(frozen=True)
class Offers:
    """The answer to a poll; no jobs is the usual one."""

    jobs: tuple[protocol.JobOffer | protocol.MalformedJob, ...]
    #: What a server that cannot hold polls asks for between two of them.
    retry_after_s: float | None = None


@dataclass(frozen=True)
class Stream:
    """A file of RVM-Server as it arrives; a redirect, which has a `location`, has no bytes of interest."""

    reply: Reply
    status: int
    headers: Mapping[str, str]
    #: Where a 302 of `download-model` leads: to be followed once, to an allowed host, without the token.
    location: str | None
    #: Position of the first byte in the file; 0 although an offset was asked for if the server has no ranges.
    offset: int
    #: Bytes of the whole file, None when the server does not say.
    size_bytes: int | None

    def chunks(self, size_bytes: int = 64 * 1024) -> Iterator[bytes]:
        """Yield the bytes; raises `ServerUnavailableError` when they end too early."""
        return self.reply.chunks(size_bytes)

    def cut(self) -> None:
        """End the transfer under the thread that reads it (`PollAbandonedError` there)."""
        self.reply.cut()


class Controller:
    """Calls RVM-Server for one start of the daemon."""

    def __init__(
        self, settings: Settings, token: TokenSource, instance_id: str, tally: Tally | None = None
    ) -> None:
        self._settings = settings
        self._tally = tally or Tally()
        self._token = token
        self._worker_id = settings.worker.id
        self.instance_id = instance_id  #: the UUID of this start of the daemon
        self._base_url = settings.server.base_url
        # RVM-Server, and a proxy before it, are named by the operator.
        self._http = HttpSessions(settings.server, named_addresses)
        self._lock = threading.Lock()
        self._polls: set[Exchange] = set()
        self._abandoned = False

    # -- the calls -----------------------------------------------------------------------------

    def offer(
        self,
        lane: str,
        *,
        slots: int,
        gpus_free: int,
        job_types: Sequence[str],
        wait_s: int,
        gpus: int = 0,
    ) -> Offers:
        """Ask for jobs of a lane; the server holds the answer up to `wait_s`. Raises `PollAbandonedError`.

        `gpus` are those that a job may get when it has waited for them; told where they are several.
        """
        params: dict[str, str | int] = {
            "worker_id": self._worker_id,
            "instance_id": self.instance_id,
            "lane": lane,
            "slots": slots,
            "gpus_free": gpus_free,
            "wait": wait_s,
            "job_types": ",".join(job_types),
            "protocol": protocol.PROTOCOL_VERSION,
        }
        if gpus > 1:
            params["gpus"] = gpus
        read_s = wait_s + min(_POLL_GRACE_S, self._settings.server.read_timeout_s)
        exchange = self._exchange("GET", "job-status", read_s)
        with self._lock:
            if self._abandoned:
                raise PollAbandonedError("the worker stops: no more polls")
            self._polls.add(exchange)
        try:
            with self._tally.request("poll"), _understood(exchange):
                status, headers, body = self._call(
                    exchange, "GET", "job-status", params=params, read_s=read_s
                )
                jobs = () if status == 204 else tuple(protocol.parse_offers(protocol.parse_json(body)))
                return Offers(jobs, retry_after_s(headers))
        finally:
            with self._lock:
                self._polls.discard(exchange)

    @property
    def held_polls(self) -> int:
        """How many polls wait for their answer."""
        with self._lock:
            return len(self._polls)

    def claim(self, job_id: str, claim_id: str) -> protocol.Claim:
        """Claim a job; the same `claim_id` again gets the same answer. Raises `FencedError` when refused."""
        request = protocol.ClaimRequest(
            job_id=job_id, worker_id=self._worker_id, instance_id=self.instance_id, claim_id=claim_id
        )
        return self._post("claim", "job-status", request, protocol.Claim)

    def progress(
        self, job_id: str, lease_token: str, seq: int, progress: protocol.Progress | Mapping[str, Any]
    ) -> protocol.Directive:
        """Report progress, renew the lease and learn whether to go on. Raises `FencedError`.

        Of a mapping, which may come from a child, what is not known or not valid is left out.
        """
        if not isinstance(progress, protocol.Progress):
            progress = protocol.progress_of(progress)
        report = protocol.ProgressReport(job_id=job_id, lease_token=lease_token, seq=seq, progress=progress)
        return self._post("progress", "job-status", report, protocol.ProgressAnswer).directive

    def finish(self, body: Mapping[str, Any]) -> None:
        """Deliver a final report as the outbox keeps it. Raises `FencedError`."""
        self._post("finish", "job-status", dict(body), protocol.FinishAnswer)

    def worker_status(self, status: protocol.WorkerStatus) -> protocol.WorkerStatusAnswer:
        """Show the worker and renew its leases. Raises `ProtocolMissingError` where the path is missing."""
        return self._post(
            "worker_status", "worker-status", status, protocol.WorkerStatusAnswer, fencing=False
        )

    def job_uploads(
        self, job_id: str, lease_token: str, files: Sequence[protocol.UploadFile]
    ) -> dict[str, protocol.UploadSlot]:
        """Ask for presigned PUTs, one per file name. Raises `FencedError`."""
        request = protocol.UploadRequest(job_id=job_id, lease_token=lease_token, files=list(files))
        slots = self._post("job_uploads", "job-uploads", request, protocol.UploadSlots).uploads
        if missing := [file.name for file in files if file.name not in slots]:
            raise ServerUnavailableError(f"POST job-uploads: no upload for {', '.join(missing[:5])}")
        return slots

    def dataset(self, dataset_id: int | str) -> protocol.DatasetInfo:
        """Look a data set up. Raises `NotFoundError`."""
        path = f"datasets/{quote(str(dataset_id), safe='')}"
        exchange = self._exchange("GET", path, self._settings.server.read_timeout_s)
        with self._tally.request("dataset"), _understood(exchange):
            _, _, body = self._call(exchange, "GET", path)
            return protocol.parse(protocol.DatasetInfo, protocol.parse_json(body).get("data"))

    def upload_model(self, upload: protocol.ModelUpload, file: Path) -> protocol.UploadedModel:
        """Upload a checkpoint as multipart, read from disk as it is sent.

        Not repeatable at every server: look for the bytes by their sha256 first (`model_path`).
        Raises `TooLargeError` or `RequestRejectedError` naming the gate, or `FencedError`.
        """
        fields = protocol.multipart_fields(upload)
        with file.open("rb") as opened:
            body = MultipartBody(fields, "model_file", f"{upload.version}.pt", opened)
            return self._upload(body, body.content_type, len(body))

    def register_model(self, upload: protocol.StoredModelUpload) -> protocol.UploadedModel:
        """Announce a checkpoint that already lies in storage, at a server that takes JSON."""
        data = protocol.encode(upload)
        return self._upload(data, _JSON, len(data))

    def training_complete(self, report: protocol.TrainingComplete | Mapping[str, Any]) -> None:
        """Make the courtesy call after a training; any answer in the 200s will do."""
        data = protocol.encode(protocol.TrainingComplete.model_validate(report))
        exchange = self._exchange("POST", "training-complete", self._settings.server.read_timeout_s)
        with self._tally.request("training_complete"):
            self._call(exchange, "POST", "training-complete", data=data)

    # -- files ---------------------------------------------------------------------------------

    def model_path(self, version_or_hash: str) -> str:
        """Return the path of `download-model` for `open_stream`."""
        return f"{urlsplit(self._base_url).path}/download-model/{quote(version_or_hash, safe='')}"

    def is_own(self, url: str) -> bool:
        """Tell whether `url`, relative or absolute, lies on RVM-Server's own origin."""
        return _origin(urljoin(f"{self._settings.server.url}/", url)) == _origin(self._base_url)

    @contextlib.contextmanager
    def open_stream(self, url: str, *, offset: int = 0, if_range: str | None = None) -> Iterator[Stream]:
        """GET a file of RVM-Server, relative to its root or absolute, from byte `offset` on.

        The token goes along beneath `/api/v1/cv/` only. `if_range` is the ETag that the earlier bytes
        had. Of the bytes only each read is bounded: their reader watches how they move. Raises
        `UrlForbiddenError` for another origin and the exceptions of `answers` for the rest.
        """
        target = self._own_url(url)
        path = urlsplit(target).path
        base_path = urlsplit(self._base_url).path
        exchange = Exchange(f"GET {_shown(path)}", sum(self._timeouts_s()))
        headers = {"Accept": _JSON}
        if path.startswith(f"{base_path}/"):
            headers["Authorization"] = f"Bearer {self._token.value()}"
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if if_range:
                headers["If-Range"] = if_range
        with self._http.send(
            exchange, "GET", target, headers=headers, timeouts_s=self._timeouts_s()
        ) as reply:
            location = None
            if path.startswith(f"{base_path}/download-model/") and reply.status in {302, 303, 307}:
                location = _location(exchange, target, reply.headers.get("Location") or "")
            elif reply.status not in {200, 206}:
                raise self._error(exchange, reply, sent_bytes=0, fencing=False)
            if reply.headers.get("Content-Encoding", "identity") != "identity":
                raise ServerUnavailableError(
                    f"{exchange.call}: the answer is compressed although it must not be"
                )
            start, size_bytes = _extent(reply)
            reply.take_time()
            yield Stream(reply, reply.status, reply.headers, location, start, size_bytes)

    # -- the end -------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Cut the held polls and start no more: a stop does not wait for them. Other calls go on."""
        with self._lock:
            self._abandoned = True
        self.let_go()

    def let_go(self) -> None:
        """Cut the held polls; their lanes may poll again."""
        with self._lock:
            polls = list(self._polls)
        for exchange in polls:
            exchange.cut()

    def close(self) -> None:
        """Close the calling thread's connections; those of other threads end with them."""
        self.abandon()
        self._http.close()

    # -- how a call is made --------------------------------------------------------------------

    def _exchange(self, method: str, path: str, limit_s: float) -> Exchange:
        whole_s = self._settings.server.connect_timeout_s + limit_s
        return Exchange(f"{method} {_shown(f'{urlsplit(self._base_url).path}/{path}')}", whole_s)

    def _timeouts_s(self, read_s: float | None = None) -> tuple[float, float]:
        server = self._settings.server
        return server.connect_timeout_s, server.read_timeout_s if read_s is None else read_s

    def _post(
        self,
        name: Call,
        path: str,
        body: protocol.Sent | dict[str, Any],
        model: type[protocol.Model],
        *,
        fencing: bool = True,
    ) -> protocol.Model:
        exchange = self._exchange("POST", path, self._settings.server.read_timeout_s)
        with self._tally.request(name), _understood(exchange):
            _, _, answer = self._call(exchange, "POST", path, data=protocol.encode(body), fencing=fencing)
            return protocol.parse(model, protocol.parse_json(answer))

    def _upload(
        self, data: MultipartBody | bytes, content_type: str, size_bytes: int
    ) -> protocol.UploadedModel:
        server = self._settings.server
        read_s = server.read_timeout_s + size_bytes / (16 * _UPLOAD_BYTES_PER_S)
        exchange = self._exchange("POST", "upload-model", read_s + size_bytes / _UPLOAD_BYTES_PER_S)
        with self._tally.request("upload_model"), _understood(exchange):
            _, _, body = self._call(
                exchange,
                "POST",
                "upload-model",
                data=data,
                content_type=content_type,
                connect_s=max(server.connect_timeout_s, server.read_timeout_s),
                read_s=read_s,
                fencing=True,
            )
            return protocol.parse(protocol.UploadedModel, protocol.parse_json(body).get("data"))

    def _call(
        self,
        exchange: Exchange,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        data: MultipartBody | bytes | None = None,
        content_type: str = _JSON,
        connect_s: float | None = None,
        read_s: float | None = None,
        fencing: bool = False,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Make one call and return status, headers and body of an answer in the 200s; raise any other."""
        headers = {"Accept": _JSON, "Authorization": f"Bearer {self._token.value()}"}
        if data is not None:
            headers["Content-Type"] = content_type
        connect_default_s, read_default_s = self._timeouts_s(read_s)
        reply = self._http.send(
            exchange,
            method,
            f"{self._base_url}/{path}",
            headers=headers,
            timeouts_s=(connect_s or connect_default_s, read_default_s),
            params=params,
            data=data,
        )
        with reply:
            if not 200 <= reply.status < 300:
                sent = len(data) if data is not None else 0
                raise self._error(exchange, reply, sent_bytes=sent, fencing=fencing)
            body = reply.read(protocol.MAX_ANSWER_BYTES)
        if body is None:
            raise ServerUnavailableError(
                f"{exchange.call}: the answer is over {protocol.MAX_ANSWER_BYTES} bytes"
            )
        return reply.status, reply.headers, body

    def _error(
        self, exchange: Exchange, reply: Reply, *, sent_bytes: int, fencing: bool
    ) -> ControllerError | FencedError:
        try:
            body = reply.read(protocol.MAX_ANSWER_BYTES) or b""
        except ServerUnavailableError:
            body = b""  # the status alone says enough
        secrets = (self._token.value(),)
        return error_of(
            exchange.call,
            reply.status,
            reply.headers,
            body,
            sent_bytes=sent_bytes,
            secrets=secrets,
            fencing=fencing,
        )

    def _own_url(self, url: str) -> str:
        target = urljoin(f"{self._settings.server.url}/", url)
        if _origin(target) != _origin(self._base_url):
            raise UrlForbiddenError(
                f"{urlsplit(target).hostname}: not RVM-Server; the token stays with RVM-Server"
            )
        segments = unquote(unquote(urlsplit(target).path)).replace("\\", "/").split("/")
        if ".." in segments or "." in segments:
            # Whoever normalises the path next would decide whether it still lies where the token may go.
            raise UrlForbiddenError("a path on RVM-Server must not hold dot segments")
        return target


@contextlib.contextmanager
def _understood(exchange: Exchange) -> Iterator[None]:
    """Turn an answer that is not JSON, or does not fit, into what the protocol says of it."""
    try:
        yield
    except protocol.AnswerError as error:
        raise ServerUnavailableError(f"{exchange.call}: the answer makes no sense: {error}") from None


def _location(exchange: Exchange, base: str, location: str) -> str | None:
    try:
        return urljoin(base, location) or None
    except ValueError:
        raise RedirectRefusedError(f"{exchange.call}: redirects to what is no URL: refused") from None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        return "", None, None
    if parts.username is not None:
        return "", None, None
    return parts.scheme, parts.hostname, port or {"http": 80, "https": 443}.get(parts.scheme)


def _shown(path: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in path)[:200]


def _extent(reply: Reply) -> tuple[int, int | None]:
    """Return (position of the first byte, bytes of the whole file or None)."""
    if reply.status == 206:
        match = re.fullmatch(
            r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", reply.headers.get("Content-Range", "")
        )
        if not match:
            raise ServerUnavailableError("a partial answer that does not say which part it is")
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = reply.headers.get("Content-Length", "")
    return 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None
