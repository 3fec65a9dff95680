"""HTTP to one server: a `requests` session per thread, and exchanges that can be cut from outside.

The time-outs of `requests` count from byte to byte, so a server that drips one every few seconds
would hold a thread for ever; and closing a session does not end a request that waits. Both are met
by shutting the socket down under the waiting thread: at the exchange's deadline, when asked, or, in a
thread that works for a job (`ended_by`), as soon as the job is to end.
"""

from __future__ import annotations

import contextlib
import http.cookiejar
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from rvmcv_worker import __version__
from rvmcv_worker.answers import ControllerError, PollAbandonedError, ServerUnavailableError, failure_of
from rvmcv_worker.checked_connections import (
    CheckedConnection,
    CheckedPool,
    CheckedTlsConnection,
    CheckedTlsPool,
    Reach,
    pool_classes,
)
from rvmcv_worker.config import ServerSettings
from rvmcv_worker.interrupt import Interrupt

_READ_BYTES = 64 * 1024
#: Read from a file and sent at once.
_SEND_BYTES = 256 * 1024
_FAULTS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)


class Exchange:
    """One request and its answer, from connecting to the last byte."""

    def __init__(self, call: str, limit_s: float) -> None:
        self.call = call  #: "GET /path", for messages
        self.limit_s = limit_s  #: for the whole of it, unless `Reply.take_time` lifts it
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._overdue = False
        self._abandoned = False
        self._interrupt: Interrupt | None = None

    def obey(self, interrupt: Interrupt) -> None:
        """End as soon as a job is to end; raises what `interrupt` asks for when that is so already."""
        interrupt.check()
        self._interrupt = interrupt
        interrupt.call(self.cut)

    def attach(self, sock: socket.socket) -> None:
        """Note the socket in use; one that is cut already goes no further."""
        with self._lock:
            self._socket = sock
            if self._overdue or self._abandoned:
                _shut_down(sock)

    def cut(self, *, overdue: bool = False) -> None:
        """End the exchange, whatever it waits for; any thread may ask."""
        with self._lock:
            self._overdue = self._overdue or overdue
            self._abandoned = self._abandoned or not overdue
            if self._socket:
                _shut_down(self._socket)

    def detach(self) -> None:
        """The socket may now serve another exchange: a late `cut` must not reach it."""
        with self._lock:
            self._socket = None
        if self._interrupt:
            self._interrupt.call_no_more(self.cut)
            self._interrupt = None

    def cut_error(self) -> ControllerError | None:
        """Return why the exchange was cut, None if it was not: cut bytes can look like a regular end.

        Raises what its job's end asks for, where that has cut it.
        """
        if self._abandoned:
            if self._interrupt:
                self._interrupt.check()
            return PollAbandonedError(f"{self.call}: abandoned, the worker does not wait for the answer")
        if self._overdue:
            return ServerUnavailableError(f"{self.call}: no whole answer within {self.limit_s:g} s")
        return None


def _shut_down(sock: socket.socket) -> None:
    # Not `sock.shutdown`: that of a TLS socket takes the TLS layer away under the thread that reads.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


#: What the calling thread does now: its `exchange`, and the `interrupt` of the job that it works for.
_current = threading.local()


@contextlib.contextmanager
def ended_by(interrupt: Interrupt) -> Iterator[None]:
    """Within, the calling thread waits for no answer once its job is to end.

    Its exchanges are cut then, and new ones not begun: what `interrupt` asks for is raised in their place.
    """
    _current.interrupt = interrupt
    try:
        yield
    finally:
        _current.interrupt = None


class _Noted(CheckedConnection):
    """A connection that tells the thread's exchange which socket it uses."""

    def connect(self) -> None:
        super().connect()
        self._note()

    def request(self, *args: Any, **kwargs: Any) -> None:
        self._note()
        super().request(*args, **kwargs)

    def _note(self) -> None:
        exchange: Exchange | None = getattr(_current, "exchange", None)
        if exchange and self.sock:
            exchange.attach(self.sock)


class _NotedTls(_Noted, CheckedTlsConnection):
    pass


class _Pool(CheckedPool):
    ConnectionCls = _Noted


class _TlsPool(CheckedTlsPool):
    ConnectionCls = _NotedTls


class _Adapter(HTTPAdapter):
    def __init__(self, reach: Reach) -> None:
        self._pool_classes = pool_classes(reach, _Pool, _TlsPool)
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, blocksize=_SEND_BYTES)
        self.poolmanager.pool_classes_by_scheme = self._pool_classes

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pool_classes
        return manager


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """No redirect has a target: `requests` would read a redirect's body whole, however long."""


class _Cutter:
    """One thread that cuts the exchanges whose deadline has passed."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._deadlines: dict[Exchange, float] = {}
        self._wakes_at_s = float("inf")
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, exchange: Exchange) -> None:
        deadline_s = time.monotonic() + exchange.limit_s
        with self._condition:
            self._deadlines[exchange] = deadline_s
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="http-deadlines", daemon=True)
                self._thread.start()
            if deadline_s < self._wakes_at_s:
                self._condition.notify()

    def forget(self, exchange: Exchange) -> None:
        with self._condition:
            self._deadlines.pop(exchange, None)

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        with self._condition:
            while not self._closed:
                now_s = time.monotonic()
                for exchange in [e for e, deadline_s in self._deadlines.items() if deadline_s <= now_s]:
                    del self._deadlines[exchange]
                    exchange.cut(overdue=True)
                self._wakes_at_s = min(self._deadlines.values(), default=float("inf"))
                idle = self._wakes_at_s == float("inf")
                self._condition.wait(None if idle else self._wakes_at_s - now_s)


class HttpSessions:
    """The sessions of all threads; nothing of the environment or of an answer changes how they work."""

    def __init__(self, server: ServerSettings, reach: Reach) -> None:
        self._server = server
        self._reach = reach
        self._local = threading.local()
        self._cutter = _Cutter()

    def send(
        self,
        exchange: Exchange,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        timeouts_s: tuple[float, float],
        params: Mapping[str, str | int] | None = None,
        data: Any = None,
    ) -> Reply:
        """Send one request and return its answer as soon as the headers are there.

        `timeouts_s` are for connecting (and for each write), and for each read. Raises
        `ServerUnavailableError`, `PollAbandonedError` when cut, and within `ended_by` what that says.
        """
        if interrupt := getattr(_current, "interrupt", None):
            exchange.obey(interrupt)
        session = self._session()
        self._cutter.watch(exchange)
        _current.exchange = exchange
        try:
            response = session.request(
                method,
                url,
                params=params,
                data=data,
                headers=headers,
                timeout=timeouts_s,
                allow_redirects=False,
                stream=True,
            )
        except _FAULTS as error:
            try:
                failure = exchange.cut_error()
            finally:
                self.release(exchange, broken=True)
            raise failure or failure_of(exchange.call, error, limit_s=timeouts_s[1]) from None
        finally:
            _current.exchange = None
        return Reply(self, exchange, response, timeouts_s[1])

    def lift_limit(self, exchange: Exchange) -> None:
        """From here on the owner watches a long transfer."""
        self._cutter.forget(exchange)

    def release(self, exchange: Exchange, *, broken: bool) -> None:
        """End an exchange; after a broken one, the thread's next request uses a fresh connection."""
        self._cutter.forget(exchange)
        exchange.detach()
        if broken:
            self.close_session()

    def close_session(self) -> None:
        """Close the calling thread's connections."""
        session: requests.Session | None = getattr(self._local, "session", None)
        if session:
            session.close()
            self._local.session = None

    def close(self) -> None:
        """Close the calling thread's connections and stop watching deadlines."""
        self.close_session()
        self._cutter.close()

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = self._make_session()
        return session

    def _make_session(self) -> requests.Session:
        session = _Session()
        session.trust_env = False
        session.mount("http://", _Adapter(self._reach))
        session.mount("https://", _Adapter(self._reach))
        session.verify = str(self._server.ca_file) if self._server.ca_file else True
        if self._server.proxy:
            session.proxies = {"http": self._server.proxy, "https": self._server.proxy}
        session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        session.headers.clear()
        session.headers["User-Agent"] = f"rvmcv-worker/{__version__}"
        # What is compressed has neither the length nor the hash that was promised.
        session.headers["Accept-Encoding"] = "identity"
        return session


def pieces(body: urllib3.BaseHTTPResponse, size_bytes: int) -> Iterator[bytes]:
    """Yield a body as it is on the wire, `size_bytes` at most at a time and never waiting to have so many.

    `stream` would wait: then a large size hides that a slow transfer moves, and a small one is slow.
    """
    while piece := body.read1(size_bytes, decode_content=False):
        yield piece


class Reply:
    """An answer whose body is yet to be read; a context manager."""

    def __init__(
        self, sessions: HttpSessions, exchange: Exchange, response: requests.Response, read_timeout_s: float
    ) -> None:
        self._sessions = sessions
        self._exchange = exchange
        self._response = response
        self._read_timeout_s = read_timeout_s
        self._whole = False
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers

    def take_time(self) -> None:
        """Lift the exchange's limit: the body is a long transfer, and its owner watches how it moves."""
        self._sessions.lift_limit(self._exchange)

    def chunks(self, size_bytes: int = _READ_BYTES) -> Iterator[bytes]:
        """Yield the body as it is on the wire; raises `ServerUnavailableError` when it is cut off."""
        stream = pieces(self._response.raw, size_bytes)
        while True:
            try:
                chunk = next(stream, None)
            except _FAULTS as error:
                failure = failure_of(self._exchange.call, error, limit_s=self._read_timeout_s)
                raise self._exchange.cut_error() or failure from None
            if cut := self._exchange.cut_error():
                raise cut
            if chunk is None:
                self._whole = True
                return
            yield chunk

    def read(self, limit_bytes: int) -> bytes | None:
        """Return the whole body, or None as soon as it is longer than `limit_bytes`."""
        body = bytearray()
        for chunk in self.chunks():
            body += chunk
            if len(body) > limit_bytes:
                return None
        return bytes(body)

    def cut(self) -> None:
        """End the transfer under the thread that reads it; any thread may ask."""
        self._exchange.cut()

    def close(self) -> None:
        """Give the connection back when the body was read to its end, else close it."""
        self._sessions.release(self._exchange, broken=not self._whole)
        self._response.close()

    def __enter__(self) -> Reply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
