"""Rows 17, 18 and 33 of the table of faults: memory, disk, files, log, and a disk that is nearly full."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rvmcv_worker.reference.server import ReferenceServer
from tests.worker_process import WorkerProcess, eventually

pytestmark = pytest.mark.slow

LOG_CAP_MB = 0.2
LIMITS: dict[str, object] = {
    "max_job_memory_gb": 0.4,
    "max_workspace_gb": 0.1,
    "max_archive_entries": 1000,
    "max_log_mb": LOG_CAP_MB,
}


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer) -> ReferenceServer:
    return shared_server


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> Iterator[WorkerProcess]:
    """One daemon for the whole module, so that each test also shows that the next job runs."""
    directory = tmp_path_factory.mktemp("worker")
    with WorkerProcess(directory, server, scale=0.01, extra={"limits": LIMITS}) as running:
        yield running


def _run(server: ReferenceServer, then: str, **config: Any) -> dict[str, Any]:
    job_id = server.queue_training({"steps": 1, "then": then, **config}, job_type="stub")
    return server.wait_until_final(job_id, 60)


def _children(worker: WorkerProcess) -> list[psutil.Process]:
    return [process for process in worker.tree() if "rvmcv_worker.compute.child" in process.cmdline()]


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        pytest.param("eat_memory", "out_of_memory", "limits.max_job_memory_gb", id="17"),
        pytest.param("fill_disk", "disk_quota", "limits.max_workspace_gb", id="18-bytes"),
        pytest.param("fill_inodes", "disk_quota", "limits.max_archive_entries", id="18-files"),
        pytest.param("sparse_file", "disk_quota", "File too large", id="18-one-file"),
    ],
)
def test_row_17_18_only_the_child_dies(
    server: ReferenceServer, worker: WorkerProcess, ending: str, code: str, said: str
) -> None:
    job = _run(server, ending)
    assert (job["status"], job["error"]["code"], job["attempt"]) == ("failed", code, 1)
    assert said in job["error"]["message"]
    assert psutil.pid_exists(worker.pid)
    assert worker.tree() == []
    assert worker.workspace_files() == []
    assert _run(server, "complete")["status"] == "completed"


def test_over_its_wall_time(server: ReferenceServer, worker: WorkerProcess) -> None:
    job = _run(server, "hang", timeout_s=0.5)
    assert (job["status"], job["error"]["code"]) == ("failed", "timed_out")
    assert worker.tree() == []


def test_row_17_the_kernel_would_take_the_child_first(server: ReferenceServer, worker: WorkerProcess) -> None:
    job_id = server.queue_training({"steps": 1, "then": "hang"}, job_type="stub")
    eventually(lambda: _children(worker))
    scores = {Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() for process in worker.tree()}
    assert scores == {"1000"}
    assert int(Path(f"/proc/{worker.pid}/oom_score_adj").read_text()) < 1000
    for process in _children(worker):
        assert resource.prlimit(process.pid, resource.RLIMIT_FSIZE) == (100_000_000, 100_000_000)
        assert resource.prlimit(process.pid, resource.RLIMIT_CORE) == (0, 0)
    server.cancel(job_id)
    server.wait_until_final(job_id, 30)


def test_row_18_a_log_without_end_is_cut_and_the_job_goes_on(
    server: ReferenceServer, worker: WorkerProcess
) -> None:
    config = {"steps": 1, "then": "flood_log", "at_most_bytes": 3_000_000}
    job_id = server.queue_training(config, job_type="stub")
    log = worker.state_dir / "work" / f"{job_id}-1" / "out" / "train.log"
    largest_bytes = 0

    def over() -> bool:
        nonlocal largest_bytes
        if log.exists():
            largest_bytes = max(largest_bytes, log.stat().st_size)
        return bool(server.job(job_id)["status"] == "completed")

    eventually(over, timeout_s=30)
    # The cut is followed by the last lines, at most 64 kB of them.
    assert LOG_CAP_MB * 1e6 <= largest_bytes < LOG_CAP_MB * 1e6 + 100_000


# -- A disk that others fill ---------------------------------------------------------------------


@pytest.fixture
def alone(worker: WorkerProcess) -> Iterator[None]:
    """The module's daemon is away, so that the test's own is the only one."""
    worker.stop()
    yield
    worker.start()


@pytest.fixture
def memory_disk() -> Iterator[Path]:
    """A directory on a file system that nobody else writes much to."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("/dev/shm is not writable: no file system to fill")
    directory = Path(tempfile.mkdtemp(prefix="rvmcv-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


def _status(server: ReferenceServer) -> dict[str, Any]:
    """Return what the worker has told of itself, nothing before it has."""
    told = [worker["status"] for worker in server.workers() if worker["status"]]
    return told[0] if told else {"reasons": []}


def _says(server: ReferenceServer, what: str) -> bool:
    return any(what in reason for reason in _status(server)["reasons"])


def _fill(file: Path, size_bytes: int) -> None:
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, size_bytes)


@pytest.mark.usefixtures("alone")
def test_row_33_nearly_full_before_a_claim_and_while_a_job_runs(
    memory_disk: Path, server: ReferenceServer
) -> None:
    spare = min(shutil.disk_usage(memory_disk).free // 2, 100_000_000)
    floor_gb = (shutil.disk_usage(memory_disk).free - spare) / 1e9
    filler = memory_disk / "filler"
    _fill(filler, spare * 3 // 2)
    limits = {"disk_floor_gb": floor_gb}
    with WorkerProcess(memory_disk / "worker", server, scale=0.01, extra={"limits": limits}) as small:
        eventually(lambda: "GB are free on the disk of" in small.log())
        job_id = server.queue_training({"steps": 40, "step_s": 0.1}, job_type="stub")
        eventually(lambda: _says(server, "disk_floor_gb"))
        assert _status(server)["state"] == "degraded"
        assert _status(server)["claims"]["train"] is False
        assert server.job(job_id)["status"] == "queued"

        filler.unlink()
        server.wait_for_job(job_id, lambda job: job["phase"] == "train" and bool(job["fraction"]), 20)
        assert _status(server)["reasons"] == []

        _fill(filler, spare * 3 // 2)  # others fill the disk while the job runs: not the job's fault
        job = server.wait_for_job(job_id, lambda job: job["status"] == "queued", 20)
        error = job["attempts"][0]["error"]
        assert (error["code"], job["attempts"][0]["counts"]) == ("worker_unfit", False)
        assert "the job itself holds" in error["message"]
        assert small.tree() == []
        assert small.workspace_files() == []

        filler.unlink()
        job = server.wait_until_final(job_id, 30)
        assert (job["status"], job["attempt"]) == ("completed", 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 MB."""
    directory = tmp_path / "small"
    directory.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m,mode=700", "rvmcv-test", str(directory)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.usefixtures("alone")
def test_a_job_that_fills_the_disk_by_itself_is_failed(small_disk: Path, server: ReferenceServer) -> None:
    limits: dict[str, object] = {"disk_floor_gb": 0.05, "max_workspace_gb": 10}
    with WorkerProcess(small_disk / "worker", server, scale=0.01, extra={"limits": limits}) as small:
        job = _run(server, "fill_disk")
        assert (job["status"], job["error"]["code"], job["attempt"]) == ("failed", "disk_quota", 1)
        assert "limits.disk_floor_gb" in job["error"]["message"]
        assert small.workspace_files() == []
        assert _run(server, "complete")["status"] == "completed"


@pytest.mark.usefixtures("alone")
def test_above_the_high_water_nothing_new_is_claimed_and_the_model_store_is_emptied(
    tmp_path: Path, server: ReferenceServer
) -> None:
    extra: dict[str, dict[str, object]] = {
        "limits": {"max_workspace_gb": 0.1, "workspace_high_water": 0.5, "disk_floor_gb": 0.01},
        "worker": {"train_slots": 2},
    }
    with WorkerProcess(tmp_path / "worker", server, scale=0.01, extra=extra) as two:
        store = two.state_dir / "models"
        store.mkdir(parents=True, exist_ok=True)
        for name in ("a" * 64, "b" * 64):
            (store / name).write_bytes(b"weights")
        config = {"steps": 1, "then": "fill_disk", "at_most_bytes": 64_000_000, "stay": True}
        large = server.queue_training(config, job_type="stub")
        eventually(lambda: _says(server, "workspace_high_water"))
        waiting = server.queue_training({"steps": 1}, job_type="stub")
        eventually(lambda: sum(path.is_file() for path in store.iterdir()) == 1)
        assert server.job(waiting)["status"] == "queued"
        server.cancel(large)
        assert server.wait_until_final(waiting, 30)["status"] == "completed"
        assert _status(server)["reasons"] == []
