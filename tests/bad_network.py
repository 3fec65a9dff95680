"""A network between worker and server that loses, delays, repeats and distorts: by rule, or by dice.

It understands HTTP so far that it can tell a claim from a final report, and act on one of them. What
neither a rule nor the dice speak of passes untouched, so one may stand before storage too. Every request
that came, and every answer of the server, whether the worker got to see it or not, is kept.
"""

from __future__ import annotations

import contextlib
import enum
import http.client
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.network_faults import HELD_S, Answer, Behaviour, Dice, Request, Visit, passes


@dataclass(frozen=True)
class Forwarded:
    """A request that reached the server, and what it answered (None: it did not)."""

    request: Request
    answer: Answer | None


@dataclass
class Rule:
    """What happens to the next `times` requests that match; None is all of them."""

    matches: Callable[[Request], bool]
    behave: Behaviour = passes
    times: int | None = 1
    taken: int = 0
    #: Set when the first one came.
    reached: threading.Event = field(default_factory=threading.Event)

    def act(self, visit: Visit) -> None:
        self.reached.set()
        self.behave(visit)

    def takes(self, request: Request) -> bool:
        """Whether this request is one of its; counts it."""
        if (self.times is not None and self.taken >= self.times) or not self.matches(request):
            return False
        self.taken += 1
        return True

    def wait(self, timeout_s: float = 20.0) -> None:
        """Wait until the first request has come to it."""
        assert self.reached.wait(timeout_s), "no request came to the rule"

    def release(self) -> None:
        """Take no more requests."""
        self.times = self.taken


class Moment(enum.Enum):
    """When a request is held."""

    BEFORE = "before the server has heard of it"
    AFTER = "when the server has acted, before the worker hears of it"


@dataclass
class Hold(Rule):
    """Holds a request, whether the worker still waits for it or not; `reached` is set at the moment."""

    moment: Moment = Moment.BEFORE
    released: threading.Event = field(default_factory=threading.Event)

    def act(self, visit: Visit) -> None:
        answer = visit.forward() if self.moment is Moment.AFTER else None
        self.reached.set()
        self.released.wait(HELD_S)
        visit.reply(answer if self.moment is Moment.AFTER else visit.forward())

    def release(self) -> None:
        """Let go what is held; what comes later passes."""
        super().release()
        self.released.set()


class BadNetwork(ThreadingHTTPServer):
    """A context manager; the worker is given `url`, and `target` may change while it runs."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str, *, dice: Dice | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.dice = dice
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.closing = threading.Event()
        self.log: list[Forwarded] = []
        self.requests: list[Request] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> BadNetwork:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for rule in self._rules:
            rule.release()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a worker that has gone; a fault of this file's own is shown by its traceback."""
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            super().handle_error(request, client_address)

    # -- rules ---------------------------------------------------------------------------------

    def on(
        self,
        kinds: str | Iterable[str],
        behave: Behaviour,
        *,
        times: int | None = 1,
        job_id: str | None = None,
    ) -> Rule:
        """Do `behave` to the next requests of these kinds ("*": any); a later rule goes first."""
        return self._add(Rule(_matcher(kinds, job_id), behave, times))

    def hold(
        self,
        kinds: str | Iterable[str],
        moment: Moment,
        *,
        job_id: str | None = None,
        phase: str | None = None,
    ) -> Hold:
        """Hold the next such request until it is released; `phase` is that of a progress report."""
        rule = Hold(_matcher(kinds, job_id, phase), moment=moment)
        self._add(rule)
        return rule

    def _add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.insert(0, rule)
        return rule

    @contextlib.contextmanager
    def all_requests(self, behave: Behaviour) -> Iterator[Rule]:
        """Do `behave` to every request within the block."""
        rule = self.on("*", behave, times=None)
        try:
            yield rule
        finally:
            rule.release()

    # -- what was seen -------------------------------------------------------------------------

    def seen(self, kind: str, job_id: str | None = None) -> list[Request]:
        """Return the requests of a kind, for one job or all."""
        with self._lock:
            return [r for r in self.requests if r.kind == kind and job_id in {None, r.job_id}]

    def wait_for(
        self, holds: Callable[[Request], bool], timeout_s: float = 20.0, *, since: int = 0
    ) -> Request:
        """Return the first request from number `since` on of which `holds` is true, once it has come."""
        with self._arrived:
            found: list[Request] = []

            def look() -> bool:
                found[:] = [r for r in self.requests[since:] if holds(r)][:1]
                return bool(found)

            assert self._arrived.wait_for(look, timeout_s), f"no such request within {timeout_s} s"
            return found[0]

    def accepted(self) -> dict[str, set[str]]:
        """Return the `finish_id`s of final reports that the server accepted, by job."""
        found: dict[str, set[str]] = {}
        with self._lock:
            log = list(self.log)
        for entry in log:
            said, answer = entry.request.said, entry.answer
            final = entry.request.kind == "finish" and said.get("status") in {
                "completed",
                "failed",
                "cancelled",
            }
            if (
                final
                and answer is not None
                and answer.status == 200
                and answer.json().get("accepted") is True
            ):
                found.setdefault(entry.request.job_id, set()).add(said["finish_id"])
        return found

    # -- on the way ----------------------------------------------------------------------------

    def arrive(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Request:
        """Note a request."""
        said: Any = None
        if "json" in headers.get("Content-Type", ""):
            with contextlib.suppress(ValueError):
                said = json.loads(body)
        said = said if isinstance(said, dict) else {}
        with self._arrived:
            number = len(self.requests)
            request = Request(number, method, path, headers, body, _kind(method, path, said), said)
            self.requests.append(request)
            self._arrived.notify_all()
        return request

    def behaviour(self, request: Request) -> Behaviour:
        """Return what happens to a request."""
        with self._lock:
            for rule in self._rules:
                if rule.takes(request):
                    return rule.act
            return self.dice.draw(request) if self.dice else passes

    def forward(self, request: Request) -> Answer | None:
        """Hand a request on, its host's name untouched, since signatures cover it."""
        answer = None
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(urlsplit(self.target).netloc, timeout=HELD_S)
            with contextlib.closing(connection):
                headers = {k: v for k, v in request.headers.items() if k.lower() != "connection"}
                connection.request(request.method, request.path, request.body, headers)
                got = connection.getresponse()
                answer = Answer(got.status, got.read(), tuple(got.getheaders()))
        with self._lock:
            self.log.append(Forwarded(request, answer))
        return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: BadNetwork

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # whoever sent it was killed in the middle
            self.close_connection = True
            return
        request = self.server.arrive(self.command, self.path, dict(self.headers.items()), body)
        network = self.server
        visit = Visit(request, self.connection, lambda: network.forward(request), network.closing)
        self.close_connection = True
        network.behaviour(request)(visit)
        self.close_connection = not visit.answered

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _any  # noqa: N815 - names that http.server looks for

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


def _kind(method: str, path: str, said: Mapping[str, Any]) -> str:
    part = path.split("?", maxsplit=1)[0].removeprefix("/api/v1/cv/").strip("/").split("/")[0]
    if part == "job-status":
        return "offer" if method == "GET" else str(said.get("event"))
    return part


def _matcher(
    kinds: str | Iterable[str], job_id: str | None, phase: str | None = None
) -> Callable[[Request], bool]:
    wanted = {kinds} if isinstance(kinds, str) else set(kinds)

    def matches(request: Request) -> bool:
        told = request.said.get("progress", {}).get("phase")
        ours = job_id in {None, request.job_id} and phase in {None, told}
        return ours and ("*" in wanted or request.kind in wanted)

    return matches
