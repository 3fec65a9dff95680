"""Row 25 of the fault list: secrets are where they were put, and nowhere else, whatever happens.

A real daemon with a token and MinIO's keys, and one with a token and presigned URLs, go through a training,
an inference, failing jobs, answers that hold what was sent, crashes, and all commands. Then everything that
they left or told is searched.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import psutil
import pytest
from minio import Minio

from rvmcv_worker.demo.drawing import draw_zip
from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings, Timing
from tests import canary, tiny_model
from tests.bad_network import BadNetwork
from tests.canary import Canaries
from tests.dataset_fixtures import draw
from tests.network_faults import Answer, Behaviour, Visit
from tests.training_jobs import SMALL
from tests.worker_process import WorkerProcess, eventually

pytest.importorskip("torch", reason="the extra `compute` is not installed")
pytestmark = pytest.mark.slow

ACCESS_KEY, SECRET_KEY = "CANARY5F0ACCESS7KEY", "canary/2b+SECRET8c0key=1d9f4e7a6b"
_WATCH_EVERY_S = 0.1
_MAX_WATCHED_BYTES = 4_000_000
_SPOILED_CHARS = 8


@dataclass
class Watch:
    """What is seen of processes and workspaces while they live."""

    canaries: Canaries
    workers: Sequence[WorkerProcess]
    #: Command lines of children, and where a secret was seen.
    children: set[str] = field(default_factory=set)
    programs: set[tuple[int, bytes]] = field(default_factory=set)
    seen: set[tuple[Path, int, int]] = field(default_factory=set)
    leaks: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        ends = threading.Event()

        def look_again() -> None:
            while not ends.wait(_WATCH_EVERY_S):
                self._look()

        thread = threading.Thread(target=look_again)
        thread.start()
        try:
            yield
        finally:
            ends.set()
            thread.join()

    def _look(self) -> None:
        for worker in self.workers:
            family = [worker.pid] if worker.is_alive() else []
            for pid in family:  # which grows
                with contextlib.suppress(OSError):
                    self._look_at_process(pid, of_daemon=pid == worker.pid)
                    family += _children(pid)
            with contextlib.suppress(OSError):  # it is gone again
                for file in worker.workspace_files():
                    self._look_at_file(file)

    def _look_at_file(self, file: Path) -> None:
        found = file.lstat()
        version = (file, found.st_mtime_ns, found.st_size)
        if version not in self.seen and stat.S_ISREG(found.st_mode) and found.st_size < _MAX_WATCHED_BYTES:
            self.seen.add(version)
            self._note(str(file), file.read_bytes())

    def _look_at_process(self, pid: int, *, of_daemon: bool) -> None:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        if (pid, line) in self.programs:
            return
        self.programs.add((pid, line))
        if not of_daemon:
            self.children.add(line.replace(b"\0", b" ").decode(errors="replace"))
        self._note(f"command line of {line[:200]!r}", line)
        self._note(f"environment of {line[:200]!r}", Path(f"/proc/{pid}/environ").read_bytes())

    def _note(self, where: str, content: bytes) -> None:
        self.leaks |= {f"{name}: {where}" for name in self.canaries.names_in(content)}


@dataclass(frozen=True)
class Stage:
    """What the two daemons went through, and what is left of it."""

    server: ReferenceServer
    network: BadNetwork
    storage: BadNetwork
    workers: tuple[WorkerProcess, WorkerProcess]
    watch: Watch
    canaries: Canaries
    printed: dict[str, str]
    jobs: dict[str, dict[str, Any]]


def _children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def _echo(status: int) -> Behaviour:
    """An answer that holds all that was asked."""

    def behave(visit: Visit) -> None:
        asked = {"headers": dict(visit.request.headers), "path": visit.request.path}
        visit.reply(Answer(status, json.dumps({"message": json.dumps(asked)}).encode()))

    return behave


def _echo_of_storage(visit: Visit) -> None:
    asked = " ".join(f"{name}: {value}" for name, value in visit.request.headers.items())
    asked = f"{asked} {ACCESS_KEY} {SECRET_KEY}".replace("<", "")
    body = f"<Error><Code>AccessDenied</Code><Message>{asked}</Message><Key>echo</Key></Error>"
    visit.reply(Answer(403, body.encode(), (("Content-Type", "application/xml"),)))


def _spoiled(visit: Visit) -> None:
    """Presigned URLs that storage refuses, so that a fault has one in it."""
    if answer := visit.forward():
        zeros = b"0" * _SPOILED_CHARS
        body = re.sub(rb"(?<=X-Amz-Signature=).{%d}" % _SPOILED_CHARS, zeros, answer.body)
        answer = Answer(answer.status, body, answer.headers)
    visit.reply(answer)


def _signatures(text: str) -> set[str]:
    """Return the signatures of presigned URLs, less what `_spoiled` changes of them."""
    return {
        signature[_SPOILED_CHARS:]
        for url in re.findall(r'https?://[^\s"]+X-Amz-Signature=[^\s"]+', text)
        for signature in parse_qs(urlsplit(url).query)["X-Amz-Signature"]
    }


def _commands(worker: WorkerProcess, *commands: list[str]) -> dict[str, str]:
    """Run commands of the worker's; returns what each printed."""
    running = {
        " ".join(command): subprocess.Popen(
            [sys.executable, "-m", "rvmcv_worker.cli", *command, "--config", str(worker.config_file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=worker.environment,
        )
        for command in commands
    }
    return {name: process.communicate(timeout=60)[0] for name, process in running.items()}


@contextlib.contextmanager
def _cores_allowed() -> Iterator[None]:
    """Let children of this process leave a core file, as a careless machine does."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("canary")
    timing = Timing(report_interval_s=1.0, hand_back_delay_s=0.1, reap_every_s=0.1)
    with (
        ReferenceServer(
            root / "server",
            settings=Settings(timing=timing),
            s3_access_key=ACCESS_KEY,
            s3_secret_key=SECRET_KEY,
        ) as server,
        BadNetwork(server.url) as network,
        BadNetwork(server.s3_endpoint) as storage,
    ):
        archive = draw_zip(root / "drawn.zip", train=4, val=2, test=0, size_px=96, seed=1)
        data_set = server.put_object("datasets", "drawn.zip", archive)
        picture = root / "picture.jpg"
        picture.write_bytes(draw(1, (96, 64)))
        server.put_object("datasets", "picture.jpg", picture)
        server.add_model(tiny_model.make(root / "tiny.pt"), model_name="yolo11", version="tiny")
        client = Minio(urlsplit(server.s3_endpoint).netloc, ACCESS_KEY, SECRET_KEY, secure=False)
        presigned = client.presigned_get_object("datasets", "picture.jpg", expires=timedelta(hours=1))
        secrets = {"token": server.worker_token, "access key": ACCESS_KEY, "secret key": SECRET_KEY}
        secrets["signature"] = next(iter(_signatures(f'"{presigned}"')))
        with_keys = WorkerProcess(
            root / "with-keys",
            server,
            url=network.url,
            job_types=("yolo11", "inference"),
            scale=0.02,
            extra={"storage": {"s3_endpoint": storage.url}, "inference": {"backend": "torch"}},
        )
        without_keys = WorkerProcess(
            root / "without-keys",
            server,
            url=network.url,
            s3_keys=False,
            worker_id="vm103",
            scale=0.02,
            extra={"worker": {"log_format": "json"}},
        )
        workers = (with_keys, without_keys)
        watch = Watch(Canaries(secrets), workers)
        with _cores_allowed(), contextlib.closing(with_keys), contextlib.closing(without_keys), watch.on():
            for worker in workers:
                worker.start()
            jobs = _go_through_it_all(server, network, storage, presigned, data_set)
            printed = _commands(with_keys, ["status"], ["status", "--json"], ["config", "show"], ["doctor"])
            printed["doctor without keys"] = _commands(without_keys, ["doctor"])["doctor"]
            _crash_and_start_again(server, workers)
        slots = [each.answer for each in network.log if each.answer and each.request.kind == "job-uploads"]
        told = b"".join(answer.body for answer in slots)
        uploads = {f"upload {number}": each for number, each in enumerate(_signatures(told.decode()))}
        canaries = Canaries({**secrets, **uploads})
        assert len(uploads) >= 3, "slots were presigned"
        yield Stage(server, network, storage, workers, watch, canaries, printed, jobs)


def _go_through_it_all(
    server: ReferenceServer, network: BadNetwork, storage: BadNetwork, presigned: str, data_set: str
) -> dict[str, dict[str, Any]]:
    """Return the jobs by what they show."""

    def stub(**config: object) -> str:
        return server.queue_training({"steps": 1, **config}, job_type="stub")

    def first_end(job_id: str) -> dict[str, Any]:
        job = server.wait_for_job(
            job_id, lambda job: bool(job["attempts"] and job["attempts"][0]["ended_as"]), 120
        )
        server.cancel(job_id)
        return job

    network.wait_for(lambda request: request.kind == "offer")
    asked = {"model_version": "tiny", "confidence_threshold": tiny_model.ANY_CONFIDENCE}
    training = server.queue_training({**SMALL, "epochs": 1, "dataset_url": data_set})
    inference = server.queue_inference({**asked, "image_url": presigned})
    no_image = server.queue_inference({**asked, "image_url": presigned.replace("picture", "none")})
    for kind, status in (("worker-status", 400), ("offer", 500), ("progress", 422), ("claim", 500)):
        network.on(kind, _echo(status))
    jobs = {name: first_end(stub(then=name)) for name in ("segfault", "fail", "bug")}
    jobs["upload"] = first_end(stub(then="flood_log", at_most_bytes=100_000))
    network.on("job-uploads", _spoiled)
    jobs["upload again"] = first_end(stub())
    network.on("finish", _echo(500))
    jobs["told late"] = first_end(stub())
    jobs["training"] = first_end(training)
    jobs["inference"] = first_end(inference)
    jobs["no image"] = first_end(no_image)
    storage.on("datasets", _echo_of_storage, times=None)
    jobs["storage echoes"] = first_end(
        server.queue_training({**SMALL, "dataset_url": "s3://datasets/echo.zip"})
    )
    return jobs


def _crash_and_start_again(server: ReferenceServer, workers: Sequence[WorkerProcess]) -> None:
    """Have both crash, one in the middle of a job, and go on."""
    job_id = server.queue_training({"steps": 1, "then": "hang", "then_in": 1}, job_type="stub")
    server.wait_for_job(job_id, lambda job: job["phase"] == "train", 20)
    for worker in workers:
        family = worker.tree()
        worker.send(signal.SIGABRT)
        assert worker.wait(20) == -signal.SIGABRT
        psutil.wait_procs(family, timeout=10)
        worker.start()
    assert server.wait_until_final(job_id, 60)["status"] == "completed"
    eventually(lambda: not [row for worker in workers for row in worker.ledger("outbox")])


def test_everything_was_gone_through(stage: Stage) -> None:
    ends = {
        name: (job["attempts"][0]["error"] or {"code": job["status"]})["code"]
        for name, job in stage.jobs.items()
    }
    assert ends == {
        "segfault": "job_crashed",
        "fail": "dataset_invalid",
        "bug": "internal",
        "upload": "completed",
        "upload again": "completed",
        "told late": "completed",
        "training": "completed",
        "inference": "completed",
        "no image": "image_unavailable",
        "storage echoes": "dataset_unavailable",
    }
    for child in ("prepare", "train", "engine"):
        assert any(child in line for line in stage.watch.children), child
    assert {"job.json", "0000.jpg"} <= {file.name for file, *_ in stage.watch.seen}


def test_no_child_is_given_a_secret(stage: Stage) -> None:
    assert stage.watch.leaks == set()


def test_a_crash_leaves_no_core_file(stage: Stage, tmp_path: Path) -> None:
    with _cores_allowed():
        program = [sys.executable, "-c", "import os; os.abort()"]
        assert subprocess.run(program, cwd=tmp_path, check=False).returncode == -signal.SIGABRT
    if not list(tmp_path.iterdir()):
        pytest.skip("on this machine a crash leaves no file where it was")
    assert [core for core in Path.cwd().glob("core*") if core.is_file()] == []


def test_nothing_is_left_on_disk_but_where_it_was_put(stage: Stage) -> None:
    for worker in stage.workers:
        directory = worker.config_file.parent
        secrets = set((directory / "credentials").iterdir())
        assert len(stage.canaries.search(directory / "credentials")) >= 1, "what is there is found"
        assert stage.canaries.search(directory, exempt=secrets) == []
        assert "http" in worker.log()


def test_nothing_is_told_to_the_server_but_in_the_header(stage: Stage) -> None:
    told = [request for request in stage.network.requests if stage.canaries.names_in(request.body)]
    assert told == []
    assert [request for request in stage.network.requests if "canary" in request.path.lower()] == []
    database = stage.server.data_dir / "reference.db"
    given = stage.canaries.names_in(database.read_bytes())
    assert given == {"signature", "access key"}, "those of the URL that was given with a job"


def test_no_artifact_holds_one(stage: Stage) -> None:
    names = [file.name for file in (stage.server.data_dir / "s3").rglob("*") if file.is_file()]
    assert names
    assert stage.canaries.search(stage.server.data_dir / "s3") == []


def test_no_command_prints_one(stage: Stage) -> None:
    assert len(stage.printed) == 5
    for command, text in stage.printed.items():
        assert text, command
        assert stage.canaries.names_in(text.encode()) == set(), command
    assert "********" in stage.printed["config show"]


def test_the_token_goes_to_the_server_alone(stage: Stage) -> None:
    heads = [str(dict(request.headers)) + request.path for request in stage.storage.requests]
    assert heads
    assert not [head for head in heads if stage.server.worker_token in head or SECRET_KEY in head]


@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
def test_the_search_finds_a_secret_however_it_is_written(tmp_path: Path, before: str) -> None:
    canaries = Canaries({"secret": SECRET_KEY})
    text = f"{before}{SECRET_KEY}&more".encode()
    for name, content in {
        "plain": text,
        "hex": text.hex().encode(),
        "base64": base64.b64encode(text),
        "url": quote(text, safe="").encode(),
        "gzip": gzip.compress(text),
    }.items():
        file = tmp_path / name
        file.write_bytes(content)
        assert canaries.search(tmp_path) == [f"secret: {file}"]
        file.unlink()
    with zipfile.ZipFile(tmp_path / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", text)
    assert canaries.search(tmp_path) == [f"secret: {tmp_path / 'zip'}"]
    assert canaries.names_in(SECRET_KEY[:-1].encode()) == set()


def test_what_a_daemon_leaves_is_searched_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "handed_out", {})
    canary.hand_out(tmp_path, SECRET_KEY, "short")
    (tmp_path / "worker.log").write_text("nothing")
    assert canary.left_behind() == []
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ledger").write_bytes(base64.b64encode(SECRET_KEY.encode()))
    assert canary.left_behind() == [f"secret 1: {tmp_path / 'state' / 'ledger'}"]
    whole = gzip.compress(bytes(100_000))
    (tmp_path / "state" / "cut.gz").write_bytes(whole[:-20])  # as a daemon leaves it that was killed
    (tmp_path / "state" / "spoiled.gz").write_bytes(whole[:20] + b"x" * 30)
    assert canary.left_behind() == [f"secret 1: {tmp_path / 'state' / 'ledger'}"]
    shutil.rmtree(tmp_path)
    assert canary.left_behind() == []
