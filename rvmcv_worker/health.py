"""The unix socket on which a running worker is asked and told things; no TCP port, ever.

HTTP/1, one request a connection. Who may connect is the file's mode; who may change something, or read
what jobs print, is the uid that the kernel names for the other end. A client that hangs or floods costs a
thread for some seconds, never the daemon, and never keeps another out: where all places are taken, whoever
has waited longest without a whole request has to go.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from rvmcv_worker.config import ConfigError
from rvmcv_worker.events import Event, event
from rvmcv_worker.routes import Answer, JobRoutes, Routes, RouteTable
from rvmcv_worker.socket_file import FILE_NAME, PART_NAME, answers, socket_path

#: How long one request may take to come, and its answer to be taken, in seconds.
_LIMIT_S = 5.0
#: Largest request, in bytes, with head and body.
_MAX_REQUEST_BYTES = 16 * 1024
#: Requests that are served at once; as many more as the kernel keeps wait for the moment of their turn.
_MAX_CLIENTS, _BACKLOG = 16, 128
#: Seconds between two looks at who has to go, and whether the worker stops, while all places are taken.
_FULL_S = 0.2


class HealthSocket(threading.Thread):
    """Listens on a file from its making until `close`, and answers from `start` on."""

    def __init__(
        self,
        directory: Path,
        routes: Routes,
        job_routes: JobRoutes | None = None,
        *,
        limit_s: float = _LIMIT_S,
    ) -> None:
        """Raises `ConfigError` when the socket cannot be made."""
        super().__init__(name="health", daemon=True)
        self.file = directory / FILE_NAME
        self._routes = RouteTable(routes, job_routes or {})
        self._limit_s = limit_s
        self._places = threading.BoundedSemaphore(_MAX_CLIENTS)
        #: Clients without a whole request yet, the oldest first.
        self._asking: dict[socket.socket, None] = {}
        self._closing = threading.Event()
        try:
            if not directory.is_dir():
                directory.mkdir(parents=True)
                directory.chmod(0o750)  # the socket is for the group too
            self._listener, self._inode = _listen(self.file)
        except OSError as error:
            raise ConfigError(
                f"[worker] runtime_dir: {self.file} cannot be made: {error.strerror or error};"
                " name a directory that the worker's user can write"
            ) from None

    def run(self) -> None:
        """Serve each client in a thread of its own."""
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                self._not_served(error)
                continue
            if not self._find_place():
                client.close()
                return
            self._asking[client] = None
            try:
                threading.Thread(
                    target=self._serve, args=(client,), name="health-client", daemon=True
                ).start()
            except RuntimeError as error:
                self._leave(client)
                client.close()
                self._not_served(error)

    def _not_served(self, error: Exception) -> None:
        if not self._closing.is_set():
            event(Event.HEALTH_REFUSED).warning(
                "{}: a client was not served: {}; nothing to do unless it stays so", self.file, error
            )
            self._closing.wait(1.0)  # out of descriptors or threads: another try at once would spin

    def _find_place(self) -> bool:
        """Wait for a place, having somebody go who says nothing; False when the worker stops first."""
        while not self._places.acquire(blocking=False):
            if self._closing.is_set():
                return False
            silent = (client for client in list(self._asking) if not _has_said_more(client))
            if client := next(silent, None):
                _end_asking(client)
            if self._places.acquire(timeout=_FULL_S):
                break
        return True

    def _leave(self, client: socket.socket) -> None:
        self._asking.pop(client, None)
        self._places.release()

    def close(self) -> None:
        """Listen no more, and take the file away if it is still this daemon's."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the `accept` that waits
        if self.is_alive():
            self.join()
        self._listener.close()
        with contextlib.suppress(OSError):
            if self.file.lstat().st_ino == self._inode:
                self.file.unlink()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, contextlib.suppress(OSError):
                received = _receive(client, time.monotonic() + self._limit_s)
                self._asking.pop(client, None)
                request = _Request(client, self._routes, received)
                client.settimeout(self._limit_s)
                client.sendall(request.answer)  # the time-out is that of the whole answer
        finally:
            self._leave(client)


class _Request(BaseHTTPRequestHandler):
    """One request, read whole before it is looked at; `answer` is what to send."""

    server_version, sys_version = "rvmcv-worker", ""

    def __init__(self, client: socket.socket, routes: RouteTable, received: bytes | None) -> None:
        self._client = client
        self._routes = routes
        self.client_address = ("unix", 0)
        self.rfile, self.wfile = io.BytesIO(), io.BytesIO()
        if received is None:
            self.requestline, self.request_version, self.command = "", self.protocol_version, ""
            self.send_error(
                HTTPStatus.BAD_REQUEST, f"no whole request of {_MAX_REQUEST_BYTES} bytes at most in its time"
            )
        else:
            self.rfile = io.BytesIO(received)
            self.handle_one_request()
        self.answer = self.wfile.getvalue()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        route = self._routes.find(self.command, path, query)
        if route is None:
            there = self._routes.has(path)
            status = HTTPStatus.METHOD_NOT_ALLOWED if there else HTTPStatus.NOT_FOUND
            self.send_error(status, f"there is only {self._routes.names}")
        elif route.is_guarded and (uid := _peer_uid(self._client)) not in {0, os.geteuid()}:
            event(Event.HEALTH_REFUSED).warning(
                "{} {} refused to uid {}: run it as root or as the worker's user", self.command, path, uid
            )
            self.send_error(HTTPStatus.FORBIDDEN, "not allowed: run as root or as the worker's user")
        else:
            self._send(self._call(route.answer))

    do_POST = do_GET  # noqa: N815 - a name that http.server looks for

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse in JSON."""
        self._send(Answer.refusal(code, message or explain or HTTPStatus(code).phrase))

    def log_message(self, *_args: object) -> None:
        """Say nothing: what changes something is told by who does it."""

    def _call(self, answer: Callable[[], Answer]) -> Answer:
        try:
            return answer()
        except Exception:  # noqa: BLE001 - a fault in a page must not pass for a dead worker
            event(Event.WORKER_FAULT).exception(
                "a fault of the worker's own in {} {}; please report it with these lines",
                self.command,
                self.path,
            )
            return Answer.refusal(
                HTTPStatus.INTERNAL_SERVER_ERROR, "a fault of the worker's own: its log says why"
            )

    def _send(self, answer: Answer) -> None:
        self.request_version = self.protocol_version  # else what is no request gets no head
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)


def _receive(client: socket.socket, deadline_s: float) -> bytes | None:
    """Return a whole request; None when it does not come in time or is too large. A body is not looked at."""
    received = bytearray()
    while len(received) <= _MAX_REQUEST_BYTES:
        head, found, body = received.partition(b"\r\n\r\n")
        if found and len(body) >= _content_length(head):
            return bytes(received)
        if (left_s := deadline_s - time.monotonic()) <= 0:
            return None
        client.settimeout(left_s)
        try:
            chunk = client.recv(4096)
        except TimeoutError:
            return None
        if not chunk:
            return None
        received += chunk
    return None


def _has_said_more(client: socket.socket) -> bool:
    """Whether something of a request lies there that its thread has not come to read yet."""
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):  # its thread has closed it
        poll.register(client, select.POLLIN)
        return bool(poll.poll(0))
    return True


def _end_asking(client: socket.socket) -> None:
    """Have the client's thread read the end of its request now; it still gets an answer."""
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RD)


def _content_length(head: bytearray) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value.strip()[:9])  # more digits are too many bytes in any case
    return 0


def _peer_uid(client: socket.socket) -> int:
    """Return the uid that the other end had when it connected, as the kernel says."""
    credentials = struct.Struct("3i")  # pid, uid, gid
    raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return int(credentials.unpack(raw)[1])


def _listen(file: Path) -> tuple[socket.socket, int]:
    """Return a listening socket and its inode; what an earlier daemon left in its place is replaced.

    The socket is made under another name and moved to its own: nobody meets it before its mode is set,
    and nothing is removed that is no socket.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(file.lstat().st_mode):
            raise FileExistsError(0, "something that is no socket lies there")
        if answers(file):
            raise FileExistsError(0, "another worker listens there")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    part = file.with_name(PART_NAME)
    try:
        part.unlink(missing_ok=True)
        with socket_path(part) as path:
            listener.bind(path)
        part.chmod(0o660)
        listener.listen(_BACKLOG)
        inode = part.stat().st_ino
        part.replace(file)
    except BaseException:
        listener.close()
        part.unlink(missing_ok=True)
        raise
    return listener, inode
