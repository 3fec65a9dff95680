"""What can be asked of a running worker: answers by method and path."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl

from rvmcv_worker.job_id import JOB_ID

#: Stands in a path for the id of a job.
JOB = "<JOB>"


@dataclass(frozen=True)
class Answer:
    """What a route answers."""

    body: bytes
    status: int = HTTPStatus.OK
    content_type: str = "application/json"

    @staticmethod
    def of(value: Mapping[str, Any], status: int = HTTPStatus.OK) -> Answer:
        """Return a JSON answer."""
        return Answer(json.dumps(value, indent=1, default=str).encode() + b"\n", status)

    @staticmethod
    def refusal(status: int, sentence: str) -> Answer:
        """Return an answer that says what is wrong."""
        return Answer.of({"error": sentence}, status)


#: Answers by method and path, as in ``{("GET", "/status"): …}``.
Routes = Mapping[tuple[str, str], Callable[[], Answer]]
#: Those of a job, as in ``{("GET", "/jobs/<JOB>/log"): …}``: they get its id and what follows the ``?``.
JobRoutes = Mapping[tuple[str, str], Callable[[str, Mapping[str, str]], Answer]]
#: What of the GETs is for root and the worker's own user alone, as is all that is not a GET: what a job
#: prints may name people's files.
_GUARDED = frozenset({f"/jobs/{JOB}/log"})


@dataclass(frozen=True)
class Route:
    """What answers a request, and whether it is for root and the worker's own user alone."""

    answer: Callable[[], Answer]
    is_guarded: bool


class RouteTable:
    """Finds what answers a request; an id that the protocol does not know as one finds nothing."""

    def __init__(self, routes: Routes, job_routes: JobRoutes) -> None:
        self._routes = routes
        self._job_routes = [
            (method, path, re.compile(re.escape(path).replace(JOB, f"({JOB_ID})")), route)
            for (method, path), route in job_routes.items()
        ]
        #: All that there is, for who asked for something else.
        self.names = ", ".join(" ".join(key) for key in (*routes, *job_routes))

    def find(self, method: str, path: str, query: str) -> Route | None:
        """Return what answers; None when nothing does."""
        if answer := self._routes.get((method, path)):
            return Route(answer, method != "GET")
        for its_method, its_path, form, job_answer in self._job_routes:
            if its_method == method and (found := form.fullmatch(path)):
                answer = partial(job_answer, found[1], dict(parse_qsl(query)))
                return Route(answer, method != "GET" or its_path in _GUARDED)
        return None

    def has(self, path: str) -> bool:
        """Whether there is such a path, by whatever method."""
        return any(path == other for _, other in self._routes) or any(
            form.fullmatch(path) for _, _, form, _ in self._job_routes
        )
