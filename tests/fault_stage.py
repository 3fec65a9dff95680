"""The stage on which faults are shown: strict reference server, bad network, real daemon, stub jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings, Timing
from tests.bad_network import BadNetwork
from tests.worker_process import WorkerProcess, eventually

#: No waiting time of a worker on a stage is longer than a few seconds.
QUICK: dict[str, dict[str, object]] = {
    "server": {"connect_timeout_s": 1.0, "read_timeout_s": 1.0, "poll_wait_s": 1}
}


@dataclass(frozen=True)
class Stage:
    """A daemon that reaches its server through `network` only."""

    server: ReferenceServer
    network: BadNetwork
    worker: WorkerProcess

    def queue(self, **config: Any) -> str:
        return self.server.queue_training({"steps": 1, **config}, job_type="stub")

    def run_until_progress(self, **config: Any) -> str:
        """Queue a job and return its id once its child has said how far it is."""
        job_id = self.queue(**config)
        self.server.wait_for_job(job_id, lambda job: job["phase"] == "train" and bool(job["fraction"]), 20)
        return job_id

    def completes(self, job_id: str, *, attempts: int = 1, within_s: float = 30) -> dict[str, Any]:
        """Wait for the job's one accepted result, and for the worker to know that it was accepted."""
        job = self.server.wait_until_final(job_id, within_s)
        assert (job["status"], len(job["attempts"])) == ("completed", attempts), job["attempts"]
        eventually(lambda: len(self.network.accepted().get(job_id, ())) == 1)
        return job

    def first_error(self, job_id: str) -> dict[str, Any]:
        """Return what the job's first attempt ended of, once it has."""
        job = self.server.wait_for_job(
            job_id, lambda job: bool(job["attempts"] and job["attempts"][0]["error"]), 60
        )
        error: dict[str, Any] = job["attempts"][0]["error"]
        return error

    def nothing_is_left(self) -> None:
        """Wait until the ledger knows of nothing; then no file and no process may be there."""
        eventually(lambda: not self.worker.ledger("claims") + self.worker.ledger("outbox"))
        assert self.worker.workspace_files() == []
        assert self.worker.tree() == []

    def the_next_job_completes(self) -> None:
        self.completes(self.queue())
        self.nothing_is_left()


@contextlib.contextmanager
def open_stage(
    directory: Path,
    *,
    timing: Timing | None = None,
    extra: dict[str, dict[str, object]] | None = None,
    scale: float = 0.01,
    start: bool = True,
    **worker: Any,
) -> Iterator[Stage]:
    """Open a stage; `worker` goes to `WorkerProcess`."""
    settings = Settings(
        timing=timing or Timing(report_interval_s=1.0, hand_back_delay_s=0.1, reap_every_s=0.1)
    )
    sections = {
        name: {**QUICK.get(name, {}), **(extra or {}).get(name, {})} for name in {*QUICK, *(extra or {})}
    }
    with (
        ReferenceServer(directory / "server", settings=settings) as server,
        BadNetwork(server.url) as network,
    ):
        process = WorkerProcess(
            directory / "worker", server, url=network.url, scale=scale, extra=sections, **worker
        )
        with contextlib.closing(process):
            if start:
                process.start()
                network.wait_for(lambda request: request.kind == "offer")
            yield Stage(server, network, process)
