"""What a bad network does to one request; `bad_network` does it."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Longest wait for a test to let go what it holds.
HELD_S = 60.0
#: Headers that belong to one connection.
_OWN_HEADERS = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}
)
HTML = b"<!doctype html><html><body><h1>nginx</h1></body></html>"


@dataclass(frozen=True)
class Request:
    """What the worker asked."""

    number: int
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    #: "offer", "claim", "progress", "finish", else the first part of the path beneath the API.
    kind: str
    #: The body, where it is a JSON object.
    said: dict[str, Any]
    at_s: float = field(default_factory=time.monotonic)

    @property
    def job_id(self) -> str:
        return str(self.said.get("job_id", ""))


@dataclass(frozen=True)
class Answer:
    """What the server said, or what somebody says in its place."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)

    def json(self) -> dict[str, Any]:
        """Return the body where it is a JSON object, else an empty one."""
        with contextlib.suppress(ValueError):
            answer = json.loads(self.body)
            if isinstance(answer, dict):
                return answer
        return {}


class Visit:
    """One request on its way: what a behaviour may do with it."""

    def __init__(
        self,
        request: Request,
        connection: socket.socket,
        forward: Callable[[], Answer | None],
        closing: threading.Event,
    ) -> None:
        self.request = request
        self.connection = connection
        self.closing = closing
        #: Hands the request to the server and returns its answer; None when it gave none.
        self.forward = forward
        #: Whether the worker has got a whole answer, and may use the connection again.
        self.answered = False

    def reply(self, answer: Answer | None, *, cut: bool = False) -> None:
        """Answer the worker; `cut` ends the connection in the middle. No answer closes it."""
        if answer is None:
            return
        given = {name.lower(): value for name, value in answer.headers}
        head = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, 'Unknown')}"]
        head += [f"{name}: {value}" for name, value in answer.headers if name.lower() not in _OWN_HEADERS]
        if answer.status != 204:
            of_head = self.request.method == "HEAD"
            head.append(f"Content-Length: {given.get('content-length', 0) if of_head else len(answer.body)}")
        message = "\r\n".join([*head, "", ""]).encode("latin-1") + answer.body
        if cut:
            message = message[: len(message) - max(1, len(answer.body) // 2)]
        self.connection.sendall(message)
        self.answered = not cut

    def close(self) -> None:
        """Close the worker's connection now."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def pause(self, seconds: float) -> None:
        """Let time pass, unless the network is taken down."""
        self.closing.wait(seconds)

    def wait_until_left(self, timeout_s: float = HELD_S) -> None:
        """Say nothing until the worker has closed the connection."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and not self.closing.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.1)
            if readable:
                return


Behaviour = Callable[[Visit], None]


def passes(visit: Visit) -> None:
    visit.reply(visit.forward())


def drop_request(visit: Visit) -> None:
    """The server never hears of it."""


def drop_answer(visit: Visit) -> None:
    """The server acts, and the worker never hears of that."""
    visit.forward()


def duplicate(visit: Visit) -> None:
    """The server hears it twice."""
    visit.forward()
    visit.reply(visit.forward())


def cut(visit: Visit) -> None:
    """The answer ends in the middle."""
    visit.reply(visit.forward(), cut=True)


def half_open(visit: Visit) -> None:
    """The connection stands, and nothing comes."""
    visit.wait_until_left()


def delay(seconds: float) -> Behaviour:
    def behave(visit: Visit) -> None:
        visit.pause(seconds / 2)
        answer = visit.forward()
        visit.pause(seconds / 2)
        visit.reply(answer)

    return behave


def late(seconds: float) -> Behaviour:
    """The worker has given up already when the request arrives."""

    def behave(visit: Visit) -> None:
        visit.close()
        visit.pause(seconds)
        visit.forward()

    return behave


def says(status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> Behaviour:
    """Something else answers in the server's place."""
    text = json.dumps(body).encode() if isinstance(body, dict) else body
    kind = "text/html" if text.startswith(b"<") else "application/json"
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return lambda visit: visit.reply(Answer(status, text, (("Content-Type", kind), *named)))


class Dice:
    """Draws what happens to a request: the same for the same seed, whatever comes in between."""

    def __init__(self, seed: int | str, *, rate: float = 0.3, longest_s: float = 0.3) -> None:
        self._seed, self._rate, self._longest_s = seed, rate, longest_s
        self._seen: Counter[tuple[str, str]] = Counter()
        self.drawn: Counter[str] = Counter()

    def draw(self, request: Request) -> Behaviour:
        key = (request.kind, request.job_id)
        self._seen[key] += 1
        rng = random.Random(f"{self._seed}/{key}/{self._seen[key]}")
        if rng.random() >= self._rate:
            return passes
        waits_s = rng.uniform(0.01, self._longest_s)
        name, behave = rng.choice(
            [
                ("drop_request", drop_request),
                ("drop_answer", drop_answer),
                ("delay", delay(waits_s)),
                ("duplicate", duplicate),
                ("late", late(waits_s)),
                ("cut", cut),
                ("server_error", says(rng.choice([500, 502, 503]), {"message": "Server Error"})),
                ("html", says(rng.choice([200, 404, 502]), HTML)),
                ("half_open", half_open),
            ]
        )
        self.drawn[name] += 1
        return behave
