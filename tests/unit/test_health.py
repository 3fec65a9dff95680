"""The unix socket by itself, with clients of every kind."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from rvmcv_worker.config import ConfigError
from rvmcv_worker.control_client import ControlClient, ControlError
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.health import (
    _BACKLOG,
    _MAX_CLIENTS,
    _MAX_REQUEST_BYTES,
    HealthSocket,
)
from rvmcv_worker.routes import Answer, JobRoutes, Routes
from rvmcv_worker.socket_file import socket_path

LIMIT_S = 0.5
Make = Callable[..., HealthSocket]


def _routes(told: list[str]) -> Routes:
    def fail() -> Answer:
        raise RuntimeError("secret-canary")

    def drain() -> Answer:
        told.append("drain")
        return Answer.of({"done": True})

    return {
        ("GET", "/status"): lambda: Answer.of({"state": "ready"}),
        ("GET", "/broken"): fail,
        ("POST", "/control/drain"): drain,
    }


def _job_routes(told: list[str]) -> JobRoutes:
    def cancel(job_id: str, _query: Mapping[str, str]) -> Answer:
        told.append(job_id)
        return Answer.of({"done": True})

    return {
        ("GET", "/jobs/<JOB>/log"): lambda job_id, query: Answer.of({"job_id": job_id, **query}),
        ("POST", "/control/cancel/<JOB>"): cancel,
    }


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def make(told: list[str]) -> Iterator[Make]:
    made: list[HealthSocket] = []

    def make(directory: Path, limit_s: float = 5.0) -> HealthSocket:
        made.append(HealthSocket(directory, _routes(told), _job_routes(told), limit_s=limit_s))
        made[-1].start()
        return made[-1]

    yield make
    for health in made:
        health.close()


def _raw(file: Path, data: bytes, *, close: bool = True) -> bytes:
    """Send bytes, and return all that comes back until the other end closes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        with socket_path(file) as path:
            client.connect(path)
        client.sendall(data)
        if close:
            client.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := client.recv(65536):
            received += chunk
    return received


def test_it_answers_and_is_told_things(make: Make, tmp_path: Path, told: list[str]) -> None:
    make(tmp_path / "run")
    client = ControlClient(tmp_path / "run")
    assert client.status() == {"state": "ready"}
    assert client.tell("drain") == {"done": True}
    assert told == ["drain"]


def test_the_file_is_for_user_and_group_and_goes_at_the_end(make: Make, tmp_path: Path) -> None:
    health = make(tmp_path / "run")
    mode = health.file.stat().st_mode
    assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o660)
    assert [entry.name for entry in health.file.parent.iterdir()] == ["health.sock"]
    health.close()
    assert list(health.file.parent.iterdir()) == []
    with pytest.raises(ControlError) as error:
        ControlClient(tmp_path / "run").status()
    assert error.value.code is ExitCode.NOT_RUNNING
    assert "the worker does not run" in str(error.value)


def test_a_path_too_long_for_a_socket_works(make: Make, tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 120)
    make(directory)
    assert ControlClient(directory).status() == {"state": "ready"}


def test_what_a_dead_daemon_left_is_replaced(make: Make, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "health.sock"))
    with pytest.raises(ControlError) as error:
        ControlClient(tmp_path).status()
    assert error.value.code is ExitCode.NOT_RUNNING
    make(tmp_path)
    assert ControlClient(tmp_path).status() == {"state": "ready"}


def test_neither_another_worker_nor_a_file_is_pushed_aside(make: Make, tmp_path: Path) -> None:
    first = make(tmp_path)
    with pytest.raises(ConfigError, match="another worker listens there"):
        make(tmp_path)
    assert ControlClient(tmp_path).status() == {"state": "ready"}
    first.close()
    (tmp_path / "health.sock").write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        make(tmp_path)
    assert (tmp_path / "health.sock").read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_a_config_error(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="runtime_dir"):
        make(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("request_line", "status", "says"),
    [
        ("GET /nothing HTTP/1.1", 404, "GET /status"),
        ("GET /control/drain HTTP/1.1", 405, "POST /control/drain"),
        ("DELETE /status HTTP/1.1", 501, "Unsupported method"),
        ("GET /broken HTTP/1.1", 500, "its log says why"),
        ("nonsense", 400, ""),
        ("GET /status?x=1 HTTP/1.1", 200, "ready"),
        ("GET /jobs/train-1_a.b/log?offset=3&offset=4 HTTP/1.1", 200, '"offset": "4"'),
        ("GET /jobs/../log HTTP/1.1", 404, "GET /jobs/<JOB>/log"),
        ("GET /jobs//log HTTP/1.1", 404, ""),
        ("GET /jobs/a%2Fb/log HTTP/1.1", 404, ""),
        ("GET /jobs/a/b/log HTTP/1.1", 404, ""),
        (f"GET /jobs/{'a' * 129}/log HTTP/1.1", 404, ""),
        ("GET /jobsXaXlog HTTP/1.1", 404, ""),
        ("GET /control/cancel/a HTTP/1.1", 405, "POST /control/cancel/<JOB>"),
    ],
)
def test_each_request_gets_its_answer(
    make: Make, tmp_path: Path, request_line: str, status: int, says: str
) -> None:
    file = make(tmp_path).file
    head, _, body = _raw(file, f"{request_line}\r\nHost: x\r\n\r\n".encode()).partition(b"\r\n\r\n")
    assert head.split()[1] == str(status).encode()
    assert says in body.decode()
    assert b"secret-canary" not in body
    json.loads(body)


def test_a_route_of_a_job_gets_its_id(make: Make, tmp_path: Path, told: list[str]) -> None:
    file = make(tmp_path).file
    assert b" 200 " in _raw(file, b"POST /control/cancel/train-1 HTTP/1.1\r\n\r\n")
    assert b" 404 " in _raw(file, b"POST /control/cancel/train-1/ HTTP/1.1\r\n\r\n")
    assert told == ["train-1"]


def test_a_body_is_taken_and_not_looked_at(make: Make, tmp_path: Path, told: list[str]) -> None:
    file = make(tmp_path).file
    head = b"POST /control/drain HTTP/1.1\r\nContent-Length: 3\r\n\r\n"
    assert b" 200 " in _raw(file, head + b"a=b", close=False)
    assert told == ["drain"]


@pytest.mark.parametrize(
    "data",
    [b"", b"GET /status HTTP/1.1\r\n", b"POST /control/drain HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf"],
)
def test_a_client_that_hangs_is_turned_away_in_time(make: Make, tmp_path: Path, data: bytes) -> None:
    file = make(tmp_path, LIMIT_S).file
    assert b" 400 " in _raw(file, data, close=False)


def test_a_length_of_many_digits_is_too_long(make: Make, tmp_path: Path, told: list[str]) -> None:
    file = make(tmp_path).file
    head = b"POST /control/drain HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n"
    assert b" 400 " in _raw(file, head)
    assert told == []


def test_a_client_that_sends_without_end_is_cut(make: Make, tmp_path: Path) -> None:
    file = make(tmp_path).file
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        _raw(file, b"GET /status HTTP/1.1\r\nX: " + b"x" * (64 * _MAX_REQUEST_BYTES))


def test_clients_that_hang_do_not_keep_others_away_for_long(make: Make, tmp_path: Path) -> None:
    file = make(tmp_path, LIMIT_S).file
    hanging = [socket.socket(socket.AF_UNIX) for _ in range(_MAX_CLIENTS)]
    try:
        for client in hanging:
            client.connect(str(file))
            client.send(b"GET ")
        assert ControlClient(tmp_path).status() == {"state": "ready"}  # once the others' time is over
        for client in hanging:
            client.settimeout(20)
            assert b" 400 " in client.recv(4096)
    finally:
        for client in hanging:
            client.close()


@pytest.mark.parametrize("said", [b"", b"GET "])
def test_however_many_hang_an_operator_gets_in_at_once(make: Make, tmp_path: Path, said: bytes) -> None:
    file = make(tmp_path, limit_s=600.0).file  # none of them is turned away for its time
    hanging = []
    try:
        for _ in range(3 * _BACKLOG):
            hanging.append(_patient_client(file))
            hanging[-1].send(said)
        start_s = time.monotonic()
        assert ControlClient(tmp_path).status() == {"state": "ready"}
        assert time.monotonic() - start_s < 5
        # Whoever has waited longest has gone, with an answer.
        hanging[0].settimeout(20)
        assert b" 400 " in hanging[0].recv(4096)
        hanging[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            hanging[-1].recv(4096)
    finally:
        for client in hanging:
            client.close()


def _patient_client(file: Path) -> socket.socket:
    """Connect, however full the kernel's queue is for the moment."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(file))  # a blocking one waits for room
    return client


def test_a_request_that_lies_there_is_not_sent_away(make: Make, tmp_path: Path) -> None:
    file = make(tmp_path, limit_s=600.0).file
    stop = threading.Event()

    def flood() -> None:
        clients = []
        while not stop.is_set():
            clients.append(_patient_client(file))
            if len(clients) > 100:
                clients.pop(0).close()
        for client in clients:
            client.close()

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        answers = [ControlClient(tmp_path).status() for _ in range(5)]
    finally:
        stop.set()
        flooding.join(20)
    assert answers == [{"state": "ready"}] * 5


def test_of_a_worker_that_hangs_the_message_says_what_was_asked(tmp_path: Path) -> None:
    client = ControlClient(tmp_path, answer_s=0.3)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "health.sock"))
        listener.listen(2)
        for asked, says in ((client.status, "asked how it is"), (lambda: client.tell("drain"), "for drain")):
            with pytest.raises(ControlError, match=f"{says} and said nothing for 0.3 s") as error:
                asked()
            assert error.value.code is ExitCode.TIMED_OUT
            assert ("whether it follows is not known" in str(error.value)) == (asked != client.status)
        full = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        for waiting in full:  # those who gave up still stand in the queue
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(str(tmp_path / "health.sock"))
        with pytest.raises(ControlError, match=r"took no connection .* not asked for drain") as error:
            client.tell("drain")
        assert error.value.code is ExitCode.TIMED_OUT
        with pytest.raises(ConfigError, match="another worker listens there"):
            HealthSocket(tmp_path, {})


def test_a_client_that_does_not_read_is_left(make: Make, told: list[str], tmp_path: Path) -> None:
    serving: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()

    def large() -> Answer:
        serving.put(threading.current_thread())
        return Answer(b"x" * 50_000_000)

    health = HealthSocket(tmp_path, {**_routes(told), ("GET", "/large"): large}, limit_s=LIMIT_S)
    health.start()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(health.file))
            client.sendall(b"GET /large HTTP/1.1\r\n\r\n")
            thread = serving.get(timeout=20)
            thread.join(20)
            assert not thread.is_alive()
        assert ControlClient(tmp_path).status() == {"state": "ready"}
    finally:
        health.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_may_look_but_neither_change_nor_read_what_jobs_print(
    make: Make, tmp_path: Path, told: list[str]
) -> None:
    file = make(tmp_path / "run").file
    file.chmod(0o666)  # as if that user were in the worker's group
    reachable = [file.parent, *file.parents]
    opened = [(place, place.stat().st_mode) for place in reachable if not place.stat().st_mode & 0o001]
    for place, mode in opened:
        place.chmod(mode | 0o011)
    try:
        look = _as_nobody(file, "GET", "/status")
        change = _as_nobody(file, "POST", "/control/drain")
        lines = _as_nobody(file, "GET", "/jobs/train_1/log?offset=0")
    finally:
        for place, mode in opened:
            place.chmod(mode)
    assert b" 200 " in look
    assert b" 403 " in change
    assert b" 403 " in lines
    assert b"run as root or as the worker's user" in change
    assert told == []


def _as_nobody(file: Path, method: str, path: str) -> bytes:
    code = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "client = socket.socket(socket.AF_UNIX)\n"
        "client.connect(sys.argv[1])\n"
        "client.sendall(f'{sys.argv[2]} {sys.argv[3]} HTTP/1.1\\r\\n\\r\\n'.encode())\n"
        "received = b''\n"
        "while chunk := client.recv(4096): received += chunk\n"
        "sys.stdout.buffer.write(received)\n"
    )
    command = [sys.executable, "-c", code, str(file), method, path]
    return subprocess.run(command, capture_output=True, check=True).stdout
