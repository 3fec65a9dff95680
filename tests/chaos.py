"""Kill daemons at random and at exact points, over a bad network, and count what went wrong.

    python -m tests.chaos --jobs 1000 --kills 1000 --seed 1

The last line is JSON; the exit status is 0 only when nothing was lost, accepted twice or left behind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings, Timing
from tests.bad_network import BadNetwork, Hold, Moment
from tests.network_faults import Dice
from tests.worker_process import WorkerProcess, eventually, still_alive

#: Half of the kills come at one of these moments, the others at any time after the start.
POINTS = tuple(itertools.product(("claim", "progress", "job-uploads", "finish"), Moment))
#: Longest life of a daemon, in seconds.
LIFE_S = 1.5
#: A job may be killed any number of times here; failed as poisoned it would be lost by right.
NEVER = 10**9
JOB = {"steps": 2, "step_s": 0.02}


@dataclass(frozen=True)
class Outcome:
    """What is promised is that the last four of the counts are 0."""

    seed: int
    jobs: int
    kills: int
    lost: int  #: jobs that did not end as completed, or whose report the server never accepted
    accepted_twice: int  #: jobs of which it accepted two final reports
    files_left: int  #: in workspaces, refused reports, and rows of the ledger
    processes_left: int  #: of killed daemons: when the next one says its first word, and at the end

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.accepted_twice or self.files_left or self.processes_left)


class Target:
    """One worker behind a network of its own, killed again and again."""

    def __init__(self, worker: WorkerProcess, network: BadNetwork, seed: str) -> None:
        self.worker = worker
        self.network = network
        self.kills = 0
        self.orphans: list[psutil.Process] = []
        self._families: list[psutil.Process] = []
        self._rng = random.Random(seed)

    def live_and_die(self) -> None:
        """Start the daemon, look whether the one before left processes, and kill it."""
        hold: Hold | None = None
        if self._rng.random() < 0.5:
            kind, moment = self._rng.choice(POINTS)
            hold = self.network.hold(kind, moment)
        life_s = self._rng.uniform(0, LIFE_S)
        lets_go_late = self._rng.random() < 0.5
        born_s = time.monotonic()
        watch = threading.Thread(target=self._look_for_orphans, args=(len(self.network.requests),))
        self.worker.start()
        watch.start()
        if hold is not None:
            hold.reached.wait(2 * LIFE_S)
        else:
            self.network.closing.wait(max(0.0, born_s + life_s - time.monotonic()))
        family = self.worker.tree()
        self.worker.kill()
        self.kills += 1
        watch.join()
        self._families = [process for process in (*self._families, *family) if process.is_running()]
        if hold is not None:
            # Now, or when the next daemon is at work: the request, or its answer, comes late.
            threading.Timer(self._rng.uniform(0, LIFE_S) if lets_go_late else 0, hold.release).start()

    def _look_for_orphans(self, first: int) -> None:
        """Whoever speaks to the server has swept before."""
        while self.worker.is_alive():
            if len(self.network.requests) > first:
                self.orphans += still_alive(self._families)
                return
            self.network.closing.wait(0.02)

    def left(self) -> tuple[int, int]:
        """Return how many files and processes are left once the daemon was stopped."""
        rows = self.worker.ledger("claims") + self.worker.ledger("outbox")
        rejected = list((self.worker.state_dir / "rejected").glob("*"))
        files = len(self.worker.workspace_files()) + len(rows) + len(rejected)
        named = str(self.worker.state_dir)
        naming = [p for p in psutil.process_iter(["cmdline"]) if named in " ".join(p.info["cmdline"] or ())]
        return files, len({*self.orphans, *still_alive(self._families), *naming})


def run(
    directory: Path, *, jobs: int, kills: int, seed: int, workers: int = 2, rate: float = 0.2, within_s: float
) -> Outcome:
    """Kill `workers` daemons `kills` times in all while they work off the jobs; `rate` of requests suffer."""
    timing = Timing(lease_train_s=5.0, report_interval_s=1.0, reap_every_s=0.2, hand_back_delay_s=0.1)
    settings = Settings(timing=timing, poison_limit=NEVER, hand_back_limit=NEVER)
    deadline_s = time.monotonic() + within_s
    with ExitStack() as stack:
        server = stack.enter_context(ReferenceServer(directory / "server", settings=settings))
        targets = [_target(stack, directory, server, f"{seed}/{n}", rate=rate) for n in range(workers)]
        queued: list[str] = []
        numbers = iter(range(kills))
        lock = threading.Lock()

        def feed(share: float) -> None:
            """Queue jobs up to a share of all, so that each life has some to work on."""
            with lock:
                while len(queued) < jobs * share:
                    queued.append(server.queue_training(JOB, job_type="stub"))

        def torment(target: Target) -> None:
            for number in numbers:
                feed((number + 1) / kills)
                target.live_and_die()
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"{number + 1} kills took longer than {within_s} s")

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(torment, targets))
        feed(1.0)
        for target in targets:
            target.worker.start()
        unfinished = [job for job in queued if not _ends(server, job, deadline_s)]
        for target in targets:
            target.network.dice = None  # the rest is delivered; whoever waits for a lost answer hears soon
            eventually(lambda t=target: unfinished or not t.worker.ledger("outbox"), 30)
            target.worker.stop()
        accepted: dict[str, set[str]] = {}
        for target in targets:
            for job_id, finish_ids in target.network.accepted().items():
                accepted.setdefault(job_id, set()).update(finish_ids)
        left = [target.left() for target in targets]
        completed = {job for job in queued if server.job(job)["status"] == "completed"}
        return Outcome(
            seed=seed,
            jobs=len(queued),
            kills=sum(target.kills for target in targets),
            lost=len([job for job in queued if job not in completed or job not in accepted]),
            accepted_twice=len([job for job, finish_ids in accepted.items() if len(finish_ids) > 1]),
            files_left=sum(files for files, _ in left),
            processes_left=sum(processes for _, processes in left),
        )


def _target(stack: ExitStack, directory: Path, server: ReferenceServer, seed: str, *, rate: float) -> Target:
    network = stack.enter_context(BadNetwork(server.url, dice=Dice(seed, rate=rate) if rate else None))
    name = f"worker{seed.replace('/', '-')}"
    worker = WorkerProcess(
        directory / name,
        server,
        url=network.url,
        worker_id=name,
        s3_keys=False,  # so that files go by job-uploads, through the network
        scale=0.03,
        extra={
            "server": {"connect_timeout_s": 1.0, "read_timeout_s": 1.0, "poll_wait_s": 1},
            "worker": {"train_slots": 2},
        },
    )
    stack.callback(worker.close)
    return Target(worker, network, seed)


def _ends(server: ReferenceServer, job_id: str, deadline_s: float) -> bool:
    try:
        server.wait_until_final(job_id, max(0.1, deadline_s - time.monotonic()))
    except TimeoutError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run, print one line of JSON, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.2, help="share of the requests that suffer")
    parser.add_argument("--keep", type=Path, help="a directory for logs and ledgers, kept at the end")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rvmcv-chaos-") as temporary:
        outcome = run(
            given.keep or Path(temporary),
            jobs=given.jobs,
            kills=given.kills,
            seed=given.seed,
            workers=given.workers,
            rate=given.rate,
            within_s=120 + 10 * (given.jobs + given.kills),
        )
    print(json.dumps(asdict(outcome)))
    return 0 if outcome.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
