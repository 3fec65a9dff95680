"""A hundred workers and ten thousand jobs at one server: each job once, and how long claims take."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import threading
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import urllib3
from sqlalchemy import ColumnElement, func, select

from benchmarks.figures import Figure
from benchmarks.stage import percentile
from rvmcv_worker.reference.database import Database
from rvmcv_worker.reference.jobs import enqueue
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.settings import Settings
from rvmcv_worker.reference.tables import TrainingJob
from rvmcv_worker.reference.wakeup import Wakeup
from tests.postgres import Postgres
from tests.reference_process import ReferenceProcess

JOBS, WORKERS = 10_000, 100
FEW, SOME_WORKERS = 100, (1, 10)
#: Claims that a figure is taken from where not every job is worked off.
SAMPLE = 500
#: Jobs of the run on SQLite, whose rate is the peer of PostgreSQL's.
PEER_JOBS = 1_000
PROCESSES = 2
JOB_TYPE = "noop"


def measure() -> list[Figure]:
    """Let workers claim and finish jobs that need no work, over HTTP, in processes of their own."""
    figures = []
    with tempfile.TemporaryDirectory(prefix="rvmcv-bench-") as directory:
        with (
            Postgres(durable=True) as postgres,
            Site(Path(directory, "postgresql"), postgres.new_database()) as site,
        ):
            for queued in (FEW, JOBS):
                for workers in SOME_WORKERS:
                    site.sample(1, 5)  # connections are made, and everything has run once
                    figures.append(_claims(workers, queued, site.sample(workers, queued)))
            site.sample(WORKERS, FEW)
            figures.append(_claims(WORKERS, FEW, site.sample(WORKERS, FEW)))
            site.fill(JOBS)
            completed = site.completed()
            start_s = time.monotonic()
            claims_ms = site.work(WORKERS, JOBS)
            seconds = time.monotonic() - start_s
            completed, again = site.completed() - completed, site.claimed_again()
        with Site(Path(directory, "sqlite"), f"sqlite:///{directory}/peer.db") as site:
            site.fill(PEER_JOBS)
            start_s = time.monotonic()
            site.work(WORKERS, PEER_JOBS)
            peer_s = time.monotonic() - start_s
    title = f"{JOBS} jobs, {WORKERS} workers"
    return [
        *figures,
        _claims(WORKERS, JOBS, claims_ms),
        Figure(f"{title}: not completed", JOBS - completed, "jobs", "0"),
        Figure(f"{title}: claimed more than once", again, "jobs", "0"),
        Figure(f"{title}: rate", JOBS / seconds, "jobs/s", "", "SQLite", PEER_JOBS / peer_s),
    ]


def _claims(workers: int, queued: int, claims_ms: list[float]) -> Figure:
    return Figure(f"claim p99, {workers} workers, {queued} queued", percentile(claims_ms, 0.99), "ms")


class Site:
    """A server as a process, workers in others, and the queue filled past the server."""

    def __init__(self, directory: Path, database_url: str) -> None:
        directory.mkdir()
        self._server = ReferenceProcess(directory, "--database-url", database_url)
        self._url = database_url

    def __enter__(self) -> Site:
        """Start."""
        self._server.__enter__()
        self._database = Database(self._url)
        self._queue = Queue(self._database, Settings(), Wakeup(), bytes(32))
        spawn = multiprocessing.get_context("spawn")
        self._processes = ProcessPoolExecutor(PROCESSES, mp_context=spawn)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._processes.shutdown()
        self._database.close()
        self._server.__exit__(kind, error, trace)

    def fill(self, queued: int) -> None:
        """Queue jobs until there are so many."""
        with self._queue.turn() as turn:
            for _ in range(queued - self._count(TrainingJob.status == "queued")):
                enqueue(turn, JOB_TYPE, {}, priority=0)

    def completed(self) -> int:
        """Return how many jobs are completed."""
        return self._count(TrainingJob.status == "completed")

    def claimed_again(self) -> int:
        """Return how many jobs have more than one attempt."""
        return self._count(TrainingJob.attempt > 1)

    def sample(self, workers: int, queued: int) -> list[float]:
        """Return how long each of some hundred claims took, in ms, with so many jobs queued at first."""
        claims_ms: list[float] = []
        while len(claims_ms) < min(SAMPLE, 5 * queued):
            self.fill(queued)
            claims_ms += self.work(workers, min(queued, SAMPLE))
        return claims_ms

    def work(self, workers: int, jobs: int) -> list[float]:
        """Let workers do so many jobs in all, or what there is; return what each claim took, in ms."""
        shares = [workers // PROCESSES + (number < workers % PROCESSES) for number in range(PROCESSES)]
        running = [
            self._processes.submit(
                _work, self._server.url, self._server.worker_token, share, -(-jobs // workers)
            )
            for share in shares
            if share
        ]
        return [claim_ms for each in running for claim_ms in each.result()]

    def _count(self, which: ColumnElement[bool]) -> int:
        with self._queue.look() as turn:
            return turn.session.scalar(select(func.count(TrainingJob.id)).where(which)) or 0


def _work(url: str, token: str, workers: int, jobs_each: int) -> list[float]:
    """Be some workers, each with a thread; runs in a process of its own."""
    claims_ms: list[list[float]] = [[] for _ in range(workers)]
    threads = [threading.Thread(target=_be_worker, args=(url, token, jobs_each, mine)) for mine in claims_ms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [claim_ms for mine in claims_ms for claim_ms in mine]


def _be_worker(url: str, token: str, jobs: int, claims_ms: list[float]) -> None:
    """Poll, claim, finish, until it has done its share or nothing comes any more."""
    who = {"worker_id": f"w-{uuid.uuid4()}", "instance_id": str(uuid.uuid4())}
    query = {**who, "lane": "train", "slots": "1", "wait": "10", "job_types": JOB_TYPE, "gpus_free": "1"}
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
    headers["Content-Type"] = "application/json"
    with urllib3.PoolManager(maxsize=1, headers=headers, retries=False, timeout=60) as http:
        path = f"{url}/api/v1/cv/job-status"

        def report(**body: Any) -> Any:
            answer = http.request("POST", path, body=json.dumps(body))
            if answer.status not in (200, 409):
                raise RuntimeError(f"{body} was answered {answer.status}: {answer.data[:500]!r}")
            return answer.json() if answer.status == 200 else None

        while len(claims_ms) < jobs:
            answer = http.request("GET", path, fields=query)
            if answer.status != 200:
                return
            job_id = answer.json()["jobs"][0]["job_id"]
            start_s = time.monotonic()
            claimed = report(event="claim", job_id=job_id, claim_id=str(uuid.uuid4()), **who)
            if claimed is None:
                continue
            claims_ms.append(1000 * (time.monotonic() - start_s))
            finish = {"finish_id": str(uuid.uuid4()), "status": "completed", "result": {}}
            report(event="finish", job_id=job_id, lease_token=claimed["lease_token"], **finish)
