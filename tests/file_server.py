"""A real HTTP server that gives files as good and bad servers do: cut, lying, changing, crawling."""

from __future__ import annotations

import contextlib
import email.message
import hashlib
import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.certificates import self_signed

#: Longest wait for a test to let a held answer go.
HELD_S = 20.0
#: Piece of a file that one write sends.
PIECE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Seen:
    """What the server saw of one request."""

    method: str
    path: str
    headers: email.message.Message
    body: bytes


Answer = Callable[["Handler"], None]


class FileServer(ThreadingHTTPServer):
    """Path -> its answers, one after another; the last one stays. A path without any is a 404."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: dict[str, list[Answer]] = {}
        self.seen: list[Seen] = []
        self.release = threading.Event()  #: lets held answers go
        self.asked_for: list[str | None] = []  #: the names that TLS was asked for
        self.held_out = False  #: whether a held answer was waited for in vain
        self.place = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.place}"
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def speak_tls(self, folder: Path, **certificate_for: Any) -> Path:
        """Answer by TLS from now on; returns the certificate, which nobody knows yet."""
        certificate, key = self_signed(folder, **certificate_for)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sni_callback = lambda _socket, name, _context: self.asked_for.append(name)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://{self.place}"
        return certificate

    def on(self, path: str, *answers: Answer) -> str:
        """Script a path; returns its URL."""
        self.script[path] = list(answers)
        return self.url + path

    def calls(self, method: str = "GET") -> list[Seen]:
        return [seen for seen in self.seen if seen.method == method]


class Handler(BaseHTTPRequestHandler):
    """Answers as the script says."""

    protocol_version = "HTTP/1.1"
    server: FileServer

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            super().handle_one_request()

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        self.server.seen.append(Seen(self.command, self.path, self.headers, body))
        # A script may tell apart what is fetched from what is sent: "POST /path".
        script = self.server.script
        answers = script.get(f"{self.command} {path}") or script.get(path) or [status(404)]
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - names that http.server looks for

    def log_message(self, *_args: object) -> None:
        """Say nothing."""

    def start(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def hold(self) -> None:
        """Wait with an open connection until the test lets go."""
        if not self.server.release.wait(HELD_S):
            self.server.held_out = True
        self.close_connection = True


def give(
    data: bytes,
    *,
    etag: str | None = None,
    ranges: bool = True,
    claim_bytes: int | None = None,
    cut_after: int | None = None,
    then_hold: bool = False,
    encoding: str | None = None,
    promise: str | None = None,
) -> Answer:
    """Give a file: `claim_bytes` lies about its length, `cut_after` ends the connection early."""

    def answer(handler: Handler) -> None:
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if_range = handler.headers.get("If-Range")
        if ranges and wanted and (if_range is None or if_range == etag):
            start = int(wanted[1])
        if start >= len(data) > 0:
            handler.start(416, Content_Length=0, Content_Range=f"bytes */{len(data)}")
            return
        extra = {"ETag": etag} if etag else {}
        extra |= {"Content-Encoding": encoding} if encoding else {}
        extra |= {"X-SHA256-Hash": promise} if promise else {}
        extra |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        whole = len(data) - start if claim_bytes is None else claim_bytes
        handler.start(206 if start else 200, Content_Length=whole, **extra)
        body = data[start:cut_after]
        for begin in range(0, len(body), PIECE_BYTES):
            handler.wfile.write(body[begin : begin + PIECE_BYTES])
        if then_hold:
            handler.hold()
        if cut_after is not None or claim_bytes is not None:
            handler.close_connection = True

    return answer


def crawl(claim_bytes: int) -> Answer:
    """Give a byte at a time, each soon enough for a read time-out never to fire."""

    def answer(handler: Handler) -> None:
        handler.start(200, Content_Length=claim_bytes)
        for _ in range(claim_bytes):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            if handler.server.release.wait(0.02):
                break
        handler.close_connection = True

    return answer


def endless() -> Answer:
    """Never stop, in chunks, without a word on the length."""

    def answer(handler: Handler) -> None:
        handler.start(200, Transfer_Encoding="chunked")
        while True:  # until the client closes the connection
            handler.wfile.write(f"{PIECE_BYTES:x}\r\n".encode() + b"x" * PIECE_BYTES + b"\r\n")

    return answer


def status(code: int, body: bytes = b"", **headers: object) -> Answer:
    def answer(handler: Handler) -> None:
        handler.start(code, Content_Length=len(body), **headers)
        handler.wfile.write(body)

    return answer


def drop() -> Answer:
    """Close the connection without an answer."""

    def answer(handler: Handler) -> None:
        handler.close_connection = True

    return answer


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
