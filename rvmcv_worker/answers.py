"""What an answer of RVM-Server means: one exception per line of the protocol's section 8.

None of these ends a job by itself: whoever made the call decides what it means for the job. Their
messages hold neither the token nor the query of a URL, which may be presigned.
"""

from __future__ import annotations

import email.utils
import json
import re
import ssl
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from rvmcv_worker.addresses import AddressRefusedError
from rvmcv_worker.errors import FencedError
from rvmcv_worker.logs import redact

#: The reasons that say that an attempt is fenced; a 404 or 409 without one of them is a misrouted request.
FENCED_REASONS = frozenset({"taken", "cancelled", "finished", "ended", "unknown_job"})
#: Longest `Retry-After` that is honoured, in seconds.
MAX_RETRY_AFTER_S = 300.0
#: How much of a rejecting answer is shown, in characters.
MAX_EXCERPT_CHARS = 500


class ControllerError(Exception):
    """A call to RVM-Server did not succeed."""

    def __init__(
        self, message: str, *, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status  #: the HTTP status, None when there was no answer
        self.retry_after_s = retry_after_s  #: what the server asked for, at most `MAX_RETRY_AFTER_S`


class TokenRejectedError(ControllerError):
    """401 or 403: claims stop, the token is read again before each retry, once a minute."""


class RateLimitedError(ControllerError):
    """429: wait `retry_after_s`."""


class RequestRejectedError(ControllerError):
    """400 or 422: a bug of ours or of the server's; repeating the request does not help."""


class TooLargeError(ControllerError):
    """413: one of the gates before the server's code would not take a body of this size."""


class PollAbandonedError(ControllerError):
    """The worker stops and does not wait for its held polls."""


class ServerUnavailableError(ControllerError):
    """No answer, or none that can be used: try again later, running jobs go on."""


class AddressForbiddenError(ServerUnavailableError):
    """The server's name leads to an address that it may not lead to; nothing was sent there."""


class RedirectRefusedError(ServerUnavailableError):
    """3xx: redirects are not followed, so that the token is seen by the configured server only."""


class NotFoundError(ServerUnavailableError):
    """404 without a reason that is ours: the thing is not there, or a proxy answers in the server's place."""


class ProtocolMissingError(NotFoundError):
    """404 on a path of the protocol: this server does not speak it."""


def excerpt(body: bytes, secrets: tuple[str, ...] = ()) -> str:
    """Return the start of an answer's text as one safe line, without secrets and URLs' queries."""
    text = body[: 16 * MAX_EXCERPT_CHARS].decode("utf-8", "replace")
    for secret in secrets:
        text = text.replace(secret, "***")
    text = re.sub(r"\s+", " ", redact(text)).strip()
    return "".join(char if char.isprintable() else "\ufffd" for char in text)[:MAX_EXCERPT_CHARS]


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of `Retry-After`, a number or a date, at most `MAX_RETRY_AFTER_S`; None without.

    A date is counted from the answer's own `Date`, so that neither machine's clock matters.
    """
    value = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return min(float(value), MAX_RETRY_AFTER_S)
    until_s = _http_date_s(value)
    if until_s is None:
        return None
    now_s = _http_date_s(headers.get("Date") or "")
    return min(max(until_s - (time.time() if now_s is None else now_s), 0.0), MAX_RETRY_AFTER_S)


def _http_date_s(value: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def error_of(
    call: str,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    sent_bytes: int,
    secrets: tuple[str, ...],
    fencing: bool,
) -> ControllerError | FencedError:
    """Return what an answer that is not a 2xx means for `call` ("POST /api/v1/cv/job-status").

    `secrets` are left out of messages; `fencing` tells whether the call is one of an attempt's.
    """
    shown = excerpt(body, secrets)
    wait_s = retry_after_s(headers)
    if 300 <= status < 400:
        where = excerpt(_place_of(headers.get("Location") or "").encode(), secrets) or "nowhere"
        return RedirectRefusedError(
            f"{call}: {status} redirects to {where}: refused; does [server] url name RVM-Server itself?",
            status=status,
        )
    if status in {401, 403}:
        return TokenRejectedError(
            f"{call}: {status}: RVM-Server rejects the worker's token; put a valid one in its place",
            status=status,
        )
    if fencing and status in {404, 409} and (reason := _fenced_reason(body)):
        return FencedError(reason)
    if status == 404:
        protocol_path = call.endswith(("/job-status", "/worker-status"))
        missing = "this server does not speak the worker protocol" if protocol_path else "not there"
        cls = ProtocolMissingError if protocol_path else NotFoundError
        return cls(f"{call}: 404: {missing}: {shown}", status=status, retry_after_s=wait_s)
    if status == 413:
        return TooLargeError(
            f"{call}: 413: {sent_bytes} bytes are too many for {_gate_413(body)}", status=status
        )
    if status in {400, 422}:
        gate = _gate_422(body)
        return RequestRejectedError(f"{call}: {status}: {gate + ': ' if gate else ''}{shown}", status=status)
    if status == 429:
        return RateLimitedError(f"{call}: 429: too many requests", status=status, retry_after_s=wait_s)
    return ServerUnavailableError(f"{call}: {status}: {shown}", status=status, retry_after_s=wait_s)


def _place_of(location: str) -> str:
    """Return a URL's host, or its path where it has none; nothing of what cannot be read."""
    try:
        target = urlsplit(location)
    except ValueError:
        return ""
    return target.hostname or target.path


def _fenced_reason(body: bytes) -> str | None:
    """Return the reason of a fencing answer; a page of HTML or another service's JSON has none."""
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    reason = answer.get("reason") if isinstance(answer, dict) else None
    return reason if isinstance(reason, str) and reason in FENCED_REASONS else None


def _gate_413(body: bytes) -> str:
    """Name the gate that most likely closed, with its usual limit and the setting that opens it."""
    if b"nginx" in body.lower():
        return "nginx (client_max_body_size, 1 MB unless set)"
    if b"post data is too large" in body.lower() or not body.lstrip().startswith(b"{"):
        return "PHP (post_max_size, 8 MB unless set)"
    return "RVM-Server's own limit (upload-model takes 200 MB)"


def _gate_422(body: bytes) -> str:
    """Name the gate of a model upload that an answer speaks of, else nothing."""
    if b"failed to upload" in body:
        return "PHP's upload_max_filesize (2 MB unless set) stopped the file"
    if b"must be a file of type" in body:
        return "RVM-Server's rule mimes:pt,onnx looks at the content and does not know a .pt"
    return ""


def failure_of(call: str, error: BaseException, *, limit_s: float) -> ServerUnavailableError:
    """Return what an exception of the HTTP library means; its own text, which holds URLs, is left out."""
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, AddressRefusedError):
            return AddressForbiddenError(f"{call}: {cause.strerror}")
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "name the CA in [server] ca_file if it is your own"
            return ServerUnavailableError(f"{call}: certificate refused: {cause.verify_message}; {hint}")
    names = {type(cause).__name__ for cause in chain}
    if names & {"ConnectTimeout", "ConnectTimeoutError"}:
        return ServerUnavailableError(f"{call}: no connection within the time allowed")
    if any(isinstance(cause, TimeoutError) for cause in chain) or names & {"ReadTimeout", "ReadTimeoutError"}:
        return ServerUnavailableError(f"{call}: no whole answer within {limit_s:g} s")
    for cause in chain:
        if isinstance(cause, ssl.SSLError):
            return ServerUnavailableError(f"{call}: TLS: {cause.reason or type(cause).__name__}")
        if isinstance(cause, OSError) and cause.strerror:
            return ServerUnavailableError(f"{call}: {cause.strerror}")
    return ServerUnavailableError(f"{call}: the connection broke ({type(chain[-1]).__name__})")


def _chain(error: BaseException) -> list[BaseException]:
    """Return `error` and what it was made from: causes, and the exceptions that libraries put into `args`."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        item = waiting.pop(0)
        if item is None or any(item is seen for seen in found):
            continue
        found.append(item)
        inner = [arg for arg in (*item.args, getattr(item, "reason", None)) if isinstance(arg, BaseException)]
        waiting += [*inner, item.__cause__, item.__context__]
    return found
