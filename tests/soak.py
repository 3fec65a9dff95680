"""Let a daemon work off mixed jobs for a while, and tell whether it grows.

    python -m tests.soak --minutes 60

The exit status is 0 only when it does not: see `Growth`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.fault_stage import Stage, open_stage

#: What the jobs do, in turn: complete, fail, crash, and run until they are cancelled.
KINDS = ("complete", "fail", "complete", "exit", "complete", "segfault", "complete", "hang")
SAMPLES = 60


@dataclass(frozen=True)
class Sample:
    """The daemon itself, without its children."""

    at_s: float
    jobs: int
    memory_mb: float  #: resident
    open_files: int
    threads: int

    @classmethod
    def take(cls, daemon: psutil.Process, start_s: float, jobs: int) -> Sample:
        with daemon.oneshot():
            memory_mb = daemon.memory_info().rss / 2**20
            return cls(time.monotonic() - start_s, jobs, memory_mb, daemon.num_fds(), daemon.num_threads())

    def __str__(self) -> str:
        return (
            f"{self.at_s:8.0f} s  {self.jobs:6d} jobs  {self.memory_mb:7.1f} MB  "
            f"{self.open_files:4d} open files  {self.threads:3d} threads"
        )


@dataclass(frozen=True)
class Growth:
    """From the second fifth of the samples to the last, by their medians: the first fifth warms up.

    Flat is up to 4 MB or 5 % of memory, up to 2 open files, up to 2 threads.
    """

    memory_mb: float
    memory_share: float
    open_files: float
    threads: float

    @classmethod
    def of(cls, samples: list[Sample]) -> Growth:
        fifth = max(1, len(samples) // 5)
        early, late = samples[fifth : 2 * fifth], samples[-fifth:]

        def grown(name: str) -> float:
            medians = [statistics.median(getattr(sample, name) for sample in part) for part in (early, late)]
            return medians[1] - medians[0]

        memory_mb = grown("memory_mb")
        share = memory_mb / statistics.median(sample.memory_mb for sample in early)
        return cls(memory_mb, share, grown("open_files"), grown("threads"))

    @property
    def is_flat(self) -> bool:
        memory_is_flat = self.memory_mb <= 4 or self.memory_share <= 0.05
        return memory_is_flat and self.open_files <= 2 and self.threads <= 2


def soak(directory: Path, *, minutes: float) -> list[Sample]:
    """Run jobs for so long; returns the samples, each printed as it is taken."""
    samples: list[Sample] = []
    every_s = minutes * 60 / SAMPLES
    with open_stage(directory, scale=0.01, job_types=("stub",)) as stage:
        daemon = psutil.Process(stage.worker.pid)
        start_s = time.monotonic()
        for number, kind in enumerate(itertools.cycle(KINDS)):
            _one_job(stage, kind)
            if time.monotonic() - start_s >= every_s * len(samples):
                samples.append(Sample.take(daemon, start_s, number + 1))
                print(samples[-1], flush=True)
                stage.network.requests.clear()
                stage.network.log.clear()
            if time.monotonic() - start_s >= minutes * 60:
                stage.nothing_is_left()
                return samples
    raise AssertionError("unreachable: the jobs go round")


def _one_job(stage: Stage, kind: str) -> None:
    """Run one job to its end; one that would be handed back is cancelled after its first attempt."""
    if kind == "hang":
        job_id = stage.run_until_progress(then="hang")
    else:
        job_id = stage.queue(steps=3, then=kind)
        if kind != "complete":
            stage.first_error(job_id)
    if kind != "complete":
        stage.server.cancel(job_id)
    stage.server.wait_until_final(job_id, 60)


def main(arguments: list[str] | None = None) -> int:
    """Run, say whether the daemon grew, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rvmcv-soak-") as directory:
        samples = soak(Path(directory), minutes=given.minutes)
    growth = Growth.of(samples)
    word = "flat" if growth.is_flat else "GROWS"
    print(
        f"{word}: {samples[-1].jobs} jobs, memory {growth.memory_mb:+.1f} MB "
        f"({growth.memory_share:+.1%}), open files {growth.open_files:+.0f}, threads {growth.threads:+.0f}"
    )
    return 0 if growth.is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
