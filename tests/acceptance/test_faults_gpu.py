"""Row 28 of the table of faults, and all else that can be wrong with a GPU, on a compiled fake NVML."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker.control_client import ControlClient
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.reference.server import ReferenceServer
from tests.fake_nvml import FakeNvml
from tests.worker_process import WorkerProcess, eventually

pytestmark = pytest.mark.slow

SCALE = 0.005


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer) -> ReferenceServer:
    return shared_server


@pytest.fixture(scope="module")
def without_wall(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH without bubblewrap: behind the wall a child of a GPU that is not there finds no device."""
    directory = tmp_path_factory.mktemp("bin")
    for name in ("choom", "prlimit", "setpriv"):
        found = shutil.which(name)
        assert found
        (directory / name).symlink_to(found)
    return str(directory)


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> FakeNvml:
    return FakeNvml(tmp_path_factory.mktemp("nvml") / "fake").install()


@pytest.fixture(scope="module")
def shared_worker(
    tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer, nvml: FakeNvml, without_wall: str
) -> Iterator[WorkerProcess]:
    with WorkerProcess(
        tmp_path_factory.mktemp("worker"),
        server,
        scale=SCALE,
        environment={"PATH": without_wall, **nvml.environment},
    ) as running:
        yield running


@pytest.fixture
def worker(server: ReferenceServer, nvml: FakeNvml, shared_worker: WorkerProcess) -> Iterator[WorkerProcess]:
    """The module's daemon, with one GPU that is well."""
    nvml.reset()
    eventually(lambda: _ready(server))
    yield shared_worker
    nvml.reset()


@pytest.fixture
def alone(worker: WorkerProcess) -> Iterator[None]:
    """The module's daemon was well and is away, so that what is seen is the test's own."""
    worker.stop()
    yield
    worker.start()


def _status(server: ReferenceServer) -> dict[str, Any]:
    workers = server.workers()
    status: dict[str, Any] = (workers and workers[0]["status"]) or {}
    return status


def _ready(server: ReferenceServer) -> bool:
    status = _status(server)
    return bool(status.get("state") in {"ready", "degraded"} and status["gpus"] and not _reasons(server))


def _reasons(server: ReferenceServer) -> str:
    """Return what is wrong beside the wall, which these daemons have to do without."""
    return "\n".join(why for why in _status(server).get("reasons", []) if not why.startswith("no wall"))


def _queue(server: ReferenceServer, *, priority: int = 0, **config: Any) -> str:
    return server.queue_training({"steps": 1, **config}, job_type="stub", priority=priority)


def _processing(server: ReferenceServer, job_id: str) -> None:
    server.wait_for_job(job_id, lambda job: job["phase"] == "train" and bool(job["fraction"]), 20)


def _child_environments(worker: WorkerProcess) -> list[dict[str, str]]:
    return [
        process.environ() for process in worker.tree() if "rvmcv_worker.compute.child" in process.cmdline()
    ]


def _child_environment(worker: WorkerProcess) -> dict[str, str]:
    (environment,) = _child_environments(worker)
    return environment


def test_its_gpus_are_told_and_a_job_gets_its_share(
    server: ReferenceServer, worker: WorkerProcess, nvml: FakeNvml
) -> None:
    (gpu,) = _status(server)["gpus"]
    assert gpu == {
        "index": 0,
        "name": "Fake RTX 0",
        "utilization_pct": 7,
        "memory_used_mb": 564,
        "memory_total_mb": 24564,
        "temperature_c": 45,
        "power_w": 30.5,
    }
    job_id = _queue(server, then="hang")
    _processing(server, job_id)
    environment = _child_environment(worker)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment["PYTORCH_ALLOC_CONF"] == f"per_process_memory_fraction:{22 * 1024 / 24564:.4f}"
    server.cancel(job_id)
    server.wait_until_final(job_id, 30)


def _doctor(worker: WorkerProcess) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "rvmcv_worker.cli", "doctor", "--config", str(worker.config_file)],
        capture_output=True,
        text=True,
        check=False,
        env=worker.environment,
    )
    return ended.returncode, next(line for line in ended.stdout.splitlines() if line.split()[1] == "gpu")


def test_doctor_tells_driver_and_free_memory(worker: WorkerProcess, nvml: FakeNvml) -> None:
    status, line = _doctor(worker)
    assert status == ExitCode.OK
    assert "Fake RTX 0 (23.4 of 24.0 GB free, 22.0 for a job), driver 580.95.05, torch for CUDA" in line
    nvml.set(gpu0_error=15)
    status, line = _doctor(worker)
    assert status == ExitCode.FAILED
    assert "GPU is lost" in line


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wanted", ["required", "auto"])
def test_row_28_nvml_absent_at_start_and_there_later(
    tmp_path: Path, server: ReferenceServer, without_wall: str, wanted: str
) -> None:
    late = FakeNvml(tmp_path / "nvml")
    if wanted == "auto":  # the library is there, the driver not yet
        late.install().set(init=9)
    with WorkerProcess(
        tmp_path / "worker",
        server,
        scale=SCALE,
        environment={"PATH": without_wall, **late.environment},
        extra={"worker": {"gpu": wanted}},
    ):
        eventually(lambda: "NVML: " in _reasons(server))
        status = _status(server)
        assert (status["state"], status["claims"]["train"], status["gpus"]) == ("degraded", False, [])
        job_id = _queue(server)
        assert server.job(job_id)["status"] == "queued"
        if wanted == "required":
            late.install()
        late.set(init=0)
        assert server.wait_until_final(job_id, 30)["status"] == "completed"
        eventually(lambda: _ready(server))


@pytest.mark.parametrize(
    "gone", [{"gpu0_error": 15}, {"count": 0, "gpu0_error": 28}, {"gpu0_xid": 79, "gpu0_xids": 1}]
)
def test_row_28_a_gpu_falls_off_the_bus_in_mid_job(
    server: ReferenceServer, worker: WorkerProcess, nvml: FakeNvml, gone: dict[str, int]
) -> None:
    running = _queue(server, steps=25, step_s=0.1)
    _processing(server, running)
    nvml.set(**gone)
    job = server.wait_for_job(running, lambda job: job["status"] == "queued", 20)
    attempt = job["attempts"][0]
    assert (attempt["error"]["code"], attempt["counts"]) == ("worker_unfit", False)
    assert "GPU 0 (Fake RTX 0)" in attempt["error"]["message"]
    assert worker.tree() == []
    eventually(lambda: "GPU 0 (Fake RTX 0)" in _reasons(server))
    assert (_status(server)["state"], _status(server)["claims"]["train"]) == ("degraded", False)
    waiting = _queue(server)
    assert server.job(waiting)["status"] == "queued"
    nvml.reset()
    assert server.wait_until_final(waiting, 30)["status"] == "completed"
    job = server.wait_until_final(running, 30)
    assert (job["status"], job["attempt"]) == ("completed", 2)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"gpu0_temperature": 95}, "is too hot: 95"),
        ({"gpu0_ecc": 2}, "2 uncorrectable memory errors"),
        ({"gpu0_xid": 62, "gpu0_xids": 2}, "had Xid 62"),
        ({"gpu0_free_mb": 9000}, "has 8.8 GB of memory for us, a job may take 22.0 GB"),
        ({"gpu0_error": 999}, "NVML: Unknown Error"),
    ],
)
def test_a_gpu_that_is_not_well_gets_no_new_job_and_keeps_the_one_it_has(
    server: ReferenceServer, worker: WorkerProcess, nvml: FakeNvml, answers: dict[str, int], said: str
) -> None:
    running = _queue(server, steps=30, step_s=0.05)
    _processing(server, running)
    waiting = _queue(server)
    nvml.set(**answers)
    eventually(lambda: said in _reasons(server))
    assert (_status(server)["state"], _status(server)["claims"]["train"]) == ("degraded", False)
    job = server.wait_until_final(running, 30)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    assert server.job(waiting)["status"] == "queued"
    nvml.reset()
    assert server.wait_until_final(waiting, 30)["status"] == "completed"
    assert said in worker.log()


def test_an_xid_of_a_program_is_not_the_gpus_fault(
    server: ReferenceServer, worker: WorkerProcess, nvml: FakeNvml
) -> None:
    nvml.set(gpu0_xid=31, gpu0_xids=3)
    nvml.set(gpu0_temperature=60)  # a reading that comes after it
    eventually(lambda: _status(server)["gpus"][0]["temperature_c"] == 60)
    assert _reasons(server) == ""


def test_memory_that_our_own_processes_hold_is_not_missed(
    server: ReferenceServer, worker: WorkerProcess, nvml: FakeNvml
) -> None:
    running = _queue(server, then="hang")
    _processing(server, running)
    nvml.set(gpu0_pid=worker.tree()[-1].pid, gpu0_pid_mb=20_000, gpu0_free_mb=4_000)
    eventually(lambda: _status(server)["gpus"][0]["memory_used_mb"] == 20_564)
    assert _reasons(server) == ""
    nvml.set(gpu0_pid=1)  # the same, held by somebody else
    eventually(lambda: "GB of memory for us" in _reasons(server))
    server.cancel(running)
    server.wait_until_final(running, 30)


def test_nvml_that_hangs_holds_up_nothing_else(
    server: ReferenceServer, worker: WorkerProcess, nvml: FakeNvml
) -> None:
    running = _queue(server, steps=60, step_s=0.05)
    _processing(server, running)
    nvml.set(hang=1)
    eventually(lambda: "NVML does not answer" in _reasons(server))
    status = _status(server)
    assert status["claims"]["train"] is False
    assert status["gpus"][0]["utilization_pct"] is None
    start_s = time.monotonic()
    (gpu,) = ControlClient(worker.config_file.parent / "run").status()["gpus"]
    assert time.monotonic() - start_s < 5, "nor does the operator wait for it"
    assert (gpu["name"], gpu["utilization_pct"]) == ("Fake RTX 0", None)
    eventually(lambda: _status(server)["uptime_s"] > status["uptime_s"])  # the worker status goes on
    job = server.wait_until_final(running, 30)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    nvml.reset()
    assert server.wait_until_final(_queue(server), 30)["status"] == "completed"


@pytest.mark.usefixtures("alone")
def test_with_two_gpus_only_the_bad_one_gets_nothing(
    tmp_path: Path, server: ReferenceServer, without_wall: str
) -> None:
    nvml = FakeNvml(tmp_path / "nvml", count=2).install()
    with WorkerProcess(
        tmp_path / "worker", server, scale=SCALE, environment={"PATH": without_wall, **nvml.environment}
    ) as two:
        eventually(lambda: _ready(server))
        nvml.set(gpu0_temperature=95)
        eventually(lambda: "GPU 0 (Fake RTX 0) is too hot" in _reasons(server))
        assert (_status(server)["state"], _status(server)["claims"]["train"]) == ("degraded", True)
        first, second = _queue(server, then="hang"), _queue(server, then="hang")
        _processing(server, first)
        assert _child_environment(two)["CUDA_VISIBLE_DEVICES"] == "1"
        assert server.job(second)["status"] == "queued"
        nvml.set(gpu1_temperature=95)
        eventually(lambda: _status(server)["claims"]["train"] is False)
        nvml.set(gpu0_temperature=45)
        _processing(server, second)
        # The first of NVML's list is lost: the other moves up there, stays GPU 1 here, and keeps its job.
        nvml.set(gpu1_temperature=45, gpu0_error=15, count=1, first=1)
        eventually(lambda: _reasons(server) == "GPU 0 (Fake RTX 0): NVML: GPU is lost")
        server.wait_for_job(second, lambda job: bool(job["attempts"][0]["error"]), 20)
        nvml.set(gpu1_temperature=51)
        eventually(lambda: [gpu["temperature_c"] for gpu in _status(server)["gpus"]] == [None, 51])
        nvml.set(gpu0_error=0, count=2, first=0)
        server.wait_for_job(second, lambda job: job["attempt"] == 2 and job["phase"] == "train", 20)
        assert (server.job(first)["status"], server.job(first)["attempt"]) == ("processing", 1)
        for job_id in (first, second):
            server.cancel(job_id)
            server.wait_until_final(job_id, 30)


@pytest.mark.usefixtures("alone")
def test_two_jobs_have_a_gpu_each_and_one_that_wants_two_waits_for_both(
    tmp_path: Path, server: ReferenceServer, without_wall: str
) -> None:
    nvml = FakeNvml(tmp_path / "nvml", count=2).install()
    with WorkerProcess(
        tmp_path / "worker", server, scale=SCALE, environment={"PATH": without_wall, **nvml.environment}
    ) as two:
        eventually(lambda: _ready(server))
        side_by_side = [_queue(server, then="hang") for _ in range(2)]
        for job_id in side_by_side:
            _processing(server, job_id)
        assert {found["CUDA_VISIBLE_DEVICES"] for found in _child_environments(two)} == {"0", "1"}
        both = _queue(server, then="hang", gpus=2)
        after = _queue(server, then="hang")  # could have the GPU that is free first, and does not get it
        server.cancel(side_by_side[0])
        kept = f"{both} is next and needs 2 GPUs: what is free is kept for it"
        eventually(lambda: kept in _reasons(server))
        urgent = _queue(server, priority=1)  # goes before it, once it is asked whether that is still next
        assert server.wait_until_final(urgent, 30)["status"] == "completed"
        server.cancel(side_by_side[1])
        _processing(server, both)
        assert server.job(after)["attempts"] == []
        eventually(lambda: "is next" not in _reasons(server))
        server.cancel(after)
        assert _child_environment(two)["CUDA_VISIBLE_DEVICES"] == "0,1"
        too_many = _queue(server, device="0,1,2")
        server.cancel(both)
        error = server.wait_until_final(too_many, 30)["error"]
        assert (error["code"], error["message"]) == (
            "unsupported_job",
            "config.gpus: 3 were asked for, this worker has 2",
        )
