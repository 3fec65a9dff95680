"""What every transfer of a file shares: an opened body, the two ways to fail, and when to give up."""

from __future__ import annotations

import contextlib
import os
import re
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rvmcv_worker.answers import (
    ControllerError,
    NotFoundError,
    RedirectRefusedError,
    RequestRejectedError,
    TokenRejectedError,
    TooLargeError,
    excerpt,
    retry_after_s,
)
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.retry import Retry

#: Tries in a row without progress before a transfer is given up.
MAX_TRIES = 6
#: Tries when the place answers that it has no such thing, or does not give or take it.
MAX_REFUSALS = 3
#: Read at once, at most.
READ_BYTES = 512 * 1024
#: Slower than this over a whole read time-out counts as a broken connection.
MIN_BYTES_PER_S = 1024
_REFUSING = (NotFoundError, RedirectRefusedError, RequestRejectedError, TokenRejectedError, TooLargeError)


class TransferError(Exception):
    """A try did not succeed; the message says what and where, without secrets."""

    def __init__(
        self, message: str, *, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status  #: of HTTP, where there was an answer
        self.retry_after_s = retry_after_s  #: seconds that the other side asked for


class BrokenError(TransferError):
    """No answer, a bad one, or one that was cut off: another try may succeed."""


class RefusedError(TransferError):
    """The place answered that it does not have it, or does not give or take it."""


@dataclass(frozen=True)
class Opened:
    """A file's bytes, from some place on, as they come."""

    chunks: Iterator[bytes]  #: raises `BrokenError` when they are cut off
    cut: Callable[[], None]  #: ends the transfer under the thread that reads it; any thread may ask
    start_bytes: int  #: the position in the file of the first
    total_bytes: int | None  #: of the whole file, where the server says so
    etag: str | None = None  #: a strong one only: equal means equal bytes
    sha256: str | None = None  #: what the server says it is


class TryAgain:
    """Decides after each failed try whether there is another, and waits for it."""

    def __init__(
        self,
        retry: Retry,
        interrupt: Interrupt,
        *,
        patience_s: float = 0.0,
        max_refusals: int = MAX_REFUSALS,
    ) -> None:
        """With `patience_s` a broken place is waited for at least so long."""
        self._retry = retry
        self._interrupt = interrupt
        self._backoff = retry.backoff()
        self._patient_until_s = time.monotonic() + patience_s
        self._max_refusals = max_refusals
        self._refusals = 0

    def progressed(self) -> None:
        """The last try brought something: count from the start again."""
        self._backoff.reset()

    def after(self, error: TransferError) -> None:
        """Wait before the next try; raises `error` when there is none, and what the interrupt asks for."""
        self._interrupt.check()
        wait_s = max(self._backoff.next_s(), error.retry_after_s or 0.0)
        self._refusals += isinstance(error, RefusedError)
        tired = self._backoff.failures >= MAX_TRIES and time.monotonic() >= self._patient_until_s
        if tired or self._refusals >= self._max_refusals:
            raise error
        if self._interrupt.wait(wait_s):
            self._interrupt.check()
        if error.__cause__:
            self._retry.before_retry(error.__cause__)


def failed_call(error: ControllerError) -> TransferError:
    """Return what a failed HTTP call means for a transfer; raise it `from` the error."""
    kind = RefusedError if isinstance(error, _REFUSING) else BrokenError
    return kind(str(error), status=error.status, retry_after_s=error.retry_after_s)


def refusal(what: str, status: int, headers: Mapping[str, str], body: bytes = b"") -> TransferError:
    """Return what an answer that is not a 2xx means for a file."""
    says = {
        401: "credentials are asked for",
        403: "access is denied",
        404: "there is no such file",
        410: "it is gone",
    }
    if 300 <= status < 400:
        message = f"{what}: HTTP {status}: redirects are not followed; name the file's own URL"
        return RefusedError(message, status=status)
    message = f"{what}: HTTP {status}: {says.get(status) or excerpt(body) or 'refused'}"
    passing = status in {408, 425, 429} or status >= 500 or status < 200
    kind = BrokenError if passing else RefusedError
    return kind(message, status=status, retry_after_s=retry_after_s(headers))


def extent(what: str, status: int, headers: Mapping[str, str]) -> tuple[int, int | None]:
    """Return (position of the first byte, bytes of the whole file where the server says so)."""
    if status == 206:
        found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", headers.get("Content-Range") or "")
        if found is None:
            raise BrokenError(f"{what}: a part came without a word on which")
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = headers.get("Content-Length") or ""
    return 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None


def strong_etag(headers: Mapping[str, str]) -> str | None:
    """Return the answer's ETag if equal ones mean equal bytes."""
    etag = headers.get("ETag") or ""
    return etag if etag.startswith('"') else None


def promised_sha256(headers: Mapping[str, str]) -> str | None:
    """Return what `X-SHA256-Hash` says; it is a promise until the bytes are hashed."""
    value = (headers.get("X-SHA256-Hash") or "").strip().lower()
    return value if re.fullmatch(r"[0-9a-f]{64}", value) else None


@contextlib.contextmanager
def watched(
    what: str,
    cut: Callable[[], None],
    interrupt: Interrupt,
    stall_s: float,
    done_bytes: Callable[[], int] | None = None,
) -> Iterator[None]:
    """Cut a transfer as soon as the end is asked for, or when it crawls: its reader waits in the socket.

    `done_bytes` tells how much has come; without it, slowness is not looked at.
    """
    finished = os.eventfd(0, os.EFD_CLOEXEC)
    crawled = threading.Event()

    def watch() -> None:
        poll = select.poll()
        poll.register(finished, select.POLLIN)
        poll.register(interrupt.fileno(), select.POLLIN)
        before = done_bytes() if done_bytes else 0
        while not (ready := poll.poll(stall_s * 1000 if done_bytes else None)):
            now = done_bytes() if done_bytes else 0
            if now - before < MIN_BYTES_PER_S * stall_s:
                crawled.set()
                break
            before = now
        if all(descriptor != finished for descriptor, _ in ready):
            cut()

    watcher = threading.Thread(target=watch, name="transfer-watch", daemon=True)
    watcher.start()
    try:
        yield
    except BrokenError:
        if crawled.is_set():
            raise BrokenError(f"{what}: came slower than {MIN_BYTES_PER_S} bytes a second") from None
        raise
    finally:
        os.eventfd_write(finished, 1)
        watcher.join()
        os.close(finished)
