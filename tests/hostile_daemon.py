"""What stands for the daemon when a hostile job runs: it holds secrets, listens, and has other jobs.

    python -m tests.hostile_daemon DIRECTORY

runs `tests/attacks/` three times, as a plain process, as a job where there is no wall, and behind the
wall, and prints what each attack has reached as JSON. A process of its own, so that it can run as any user.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pty
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rvmcv_worker import launch, workspace
from rvmcv_worker.config import LimitSettings
from rvmcv_worker.errors import JobError
from rvmcv_worker.executor import ChildSpec, run_child
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.sandbox import Bubblewrap, PlainProcess, Sandbox
from rvmcv_worker.spawner import Spawner
from rvmcv_worker.workspace import Workspace
from tests.attacks.main import ATTACKS

LIMITS = LimitSettings(max_job_memory_gb=0.4, max_workspace_gb=0.8, disk_floor_gb=0.001, max_log_mb=1.0)
#: More than a job may hold in memory.
_FILL_BYTES = 500_000_000
#: So few that a fork bomb is over soon.
_MAX_PROCESSES = 100
_TIMEOUT_S = 90.0
_ATTACKS = Path(__file__).parent / "attacks"

_LIBC = ctypes.CDLL(None, use_errno=True)


def _canary(what: str) -> str:
    return f"canary-{what}-{uuid.uuid4().hex}"


@dataclass
class Secrets:
    """What the daemon has that no job may have, and where a job would look for it."""

    directory: Path
    targets: dict[str, Any] = field(default_factory=dict)
    memory: Any = None

    def lay_out(self) -> None:
        """Write the files, fill the memory, open the descriptor that a careless program leaves open."""
        credentials = self.directory / "credentials"
        credentials.mkdir(mode=0o700)
        token = credentials / "rvm-token"
        token.write_text(_canary("token"))
        token.chmod(0o600)
        config = self.directory / "config.toml"
        config.write_text(f"# {_canary('config')}")
        in_tmp = Path("/tmp", f"rvmcv-{uuid.uuid4().hex}")
        in_tmp.write_text(_canary("tmp"))
        in_shm = Path("/dev/shm", in_tmp.name)
        in_shm.write_text(_canary("shm"))
        self.memory = ctypes.create_string_buffer(_canary("memory").encode())
        os.set_inheritable(os.open(token, os.O_RDONLY), True)
        self.targets |= {
            "token": str(token),
            "token_from_daemon": os.path.relpath(token),
            "config": str(config),
            "in_tmp": str(in_tmp),
            "in_shm": str(in_shm),
            "user": "ordinary" if os.getuid() else "root",
            "daemon_pid": os.getpid(),
            "daemon_name": "tests.hostile_daemon",
            "address": ctypes.addressof(self.memory),
            "handle": _file_handle(token),
            "key": f"rvmcv-{uuid.uuid4().hex}",
            "system_v_key": uuid.uuid4().int & 0x7FFFFFFF,
            "fill_bytes": _FILL_BYTES,
        }
        with contextlib.suppress(OSError):
            join_session, session_keyring = 1, -3
            _call(250, join_session, None)
            canary = _canary("key").encode()
            key = self.targets["key"].encode()
            _call(248, b"user", key, canary, ctypes.c_size_t(len(canary)), session_keyring)

    @contextlib.contextmanager
    def shared_memory(self) -> Iterator[None]:
        """Hold a segment of System V shared memory."""
        create, remove = 0o1000 | 0o600, 0
        number = _LIBC.shmget(self.targets["system_v_key"], ctypes.c_size_t(4096), create)
        _LIBC.shmat.restype = ctypes.c_void_p
        address = _LIBC.shmat(number, None, 0)
        ctypes.memmove(address, _canary("system-v").encode(), 60)
        try:
            yield
        finally:
            _LIBC.shmctl(number, remove, None)
            for name in ("in_tmp", "in_shm"):
                Path(self.targets[name]).unlink()


def _call(number: int, *arguments: Any) -> int:
    result: int = _LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _file_handle(path: Path) -> tuple[int, str]:
    """Return a file's kind of handle and the handle; nothing where the file system has none."""
    room = 128
    handle = ctypes.create_string_buffer(room.to_bytes(4, sys.byteorder) + bytes(4 + room))
    try:
        _call(303, -100, os.fsencode(path), handle, ctypes.byref(ctypes.c_int()), 0)
    except OSError:
        return 0, ""
    length = int.from_bytes(handle.raw[:4], sys.byteorder)
    return int.from_bytes(handle.raw[4:8], sys.byteorder), handle.raw[8 : 8 + length].hex()


class Services:
    """Sockets of every kind that greet whoever reaches them."""

    def __init__(self, secrets: Secrets) -> None:
        self._selector = selectors.DefaultSelector()
        tcp = socket.create_server(("127.0.0.1", 0))
        path = str(secrets.directory / "health.sock")
        by_path, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        by_path.bind(path)
        name = f"rvmcv-{uuid.uuid4().hex}"
        abstract.bind(f"\0{name}")
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", 0))
        secrets.targets |= {"port": tcp.getsockname()[1], "udp_port": self._udp.getsockname()[1]}
        secrets.targets |= {"unix": path, "abstract": name, "port6": 0}
        listening = [tcp, by_path, abstract]
        with contextlib.suppress(OSError):
            tcp6 = socket.create_server(("::1", 0), family=socket.AF_INET6)
            secrets.targets["port6"] = tcp6.getsockname()[1]
            listening.append(tcp6)
        for server in listening:
            server.listen()
            self._selector.register(server, selectors.EVENT_READ)
        self._selector.register(self._udp, selectors.EVENT_READ)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                server = key.fileobj
                assert isinstance(server, socket.socket)
                with contextlib.suppress(OSError):
                    if server is self._udp:
                        server.sendto(_canary("service").encode(), server.recvfrom(100)[1])
                    else:
                        client, _ = server.accept()
                        with client:
                            client.sendall(_canary("service").encode())
                            client.recv(100)


class Terminal:
    """A terminal that the daemon was started from."""

    def __init__(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSCTTY, 0)
        tty = termios.tcgetattr(self._slave)
        tty[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(self._slave, termios.TCSANOW, tty)
        os.set_blocking(self._slave, False)

    def typed(self) -> str:
        """Return what was typed since this was last called, by whomever."""
        try:
            return os.read(self._slave, 100).decode()
        except OSError:
            return ""


class Victim:
    """A process of another job."""

    def __init__(self, secrets: Secrets) -> None:
        self._process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        secrets.targets["victim_pid"] = self._process.pid

    def close(self) -> str:
        """End it; returns how it ended before, if it did."""
        ended = self._process.poll()
        self._process.kill()
        self._process.communicate()
        return "" if ended is None else f"ended with status {ended}"


def _orphans(mark: str) -> list[int]:
    """Return the processes with this mark on their command line."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if mark in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


class Stage:
    """One workspace with all that surrounds it; runs the attacks and sees what they did."""

    def __init__(self, secrets: Secrets, place: Workspace, other: Workspace, spawner: Spawner) -> None:
        self._secrets, self._place, self._spawner = secrets, place, spawner
        self._terminal = Terminal()
        (place.in_dir / "dataset.zip").write_text(_canary("own"))
        shutil.copytree(_ATTACKS, place.in_dir / "tests" / "attacks")
        (place.in_dir / "tests" / "__init__.py").touch()
        (place.child_dir("prepare") / "data.yaml").write_text("names: []")
        (place.out_dir / "frozen.pt").write_text(_canary("frozen"))
        secret = other.in_dir / "dataset.zip"
        secret.write_text(_canary("other-job"))
        secrets.targets |= {"other": str(secret), "other_root_name": other.root.name}

    def attacked(self, name: str, sandbox: Sandbox | None, only: str = "") -> dict[str, dict[str, str]]:
        """Run the attacks in a child called `name`; returns what each has reached."""
        victim = Victim(self._secrets)
        mark = f"rvmcv-orphan-{uuid.uuid4().hex}"
        targets = {**self._secrets.targets, "orphan": mark, "walled": isinstance(sandbox, Bubblewrap)}
        job: dict[str, Any] = {"targets": targets, "only": [only] if only else []}
        self._terminal.typed()
        try:
            found = self._plain(name, job) if sandbox is None else self._child(name, job, sandbox)
            left = _orphans(mark)
        finally:
            for pid in _orphans(mark):
                os.kill(pid, signal.SIGKILL)
            killed = victim.close()
        if "leave a process behind" in found:
            found["leave a process behind"] = (
                {"reached": f"{len(left)} processes"} if left else {"refused": ""}
            )
        kill = only or "kill another job's process"
        if killed:
            found[kill] = {"reached": f"another job's process {killed}"}
        elif kill in found and only.startswith("kill"):
            found[kill] = {"refused": "the other job's process lives"}
        typed = self._terminal.typed()
        if "type into the daemon's terminal" in found and not typed:
            found["type into the daemon's terminal"] = {"refused": "nothing was typed"}
        return found

    def _plain(self, name: str, job: dict[str, Any]) -> dict[str, dict[str, str]]:
        """As a program would start another that has never thought about it."""
        self._place.write_job(name, {**job, "progress_fd": 1})
        with (self._place.out_dir / f"{name}.log").open("wb") as log:
            subprocess.run(
                self._argv(name),
                cwd=self._place.root,
                close_fds=False,
                timeout=_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        answer = self._place.read_result(name)
        assert answer, f"no result: {(self._place.out_dir / f'{name}.log').read_text()}"
        return dict(answer["result"])

    def _child(self, name: str, job: dict[str, Any], sandbox: Sandbox) -> dict[str, dict[str, str]]:
        interrupt = Interrupt()
        try:
            end = run_child(
                ChildSpec(name, job, _TIMEOUT_S, readable=("prepare",)),
                workspace=self._place,
                sandbox=sandbox,
                spawner=self._spawner,
                limits=LIMITS,
                interrupt=interrupt,
                on_progress=lambda _: None,
                command=self._argv(),
            )
        except JobError as error:
            if not job["only"]:
                raise
            return {only: {"refused": error.message.splitlines()[0]} for only in job["only"]}
        finally:
            interrupt.close()
        return end.result

    def _argv(self, *name: str) -> tuple[str, ...]:
        program = "import sys; sys.path.insert(0, 'in'); from tests.attacks.main import main; main()"
        return (*launch.PYTHON, "-c", program, *name)


def main() -> None:
    """Lay out, attack, tell."""
    os.umask(0o077)
    directory = Path(sys.argv[1])
    secrets = Secrets(directory)
    secrets.lay_out()
    Services(secrets)
    spawner = Spawner()
    wall = Bubblewrap(hide=[directory])
    wall.probe()
    found: dict[str, dict[str, dict[str, str]]] = {"plain": {}, "none": {}, "wall": {}}
    with (
        secrets.shared_memory(),
        workspace.make(directory / "work", "job", 1) as place,
        workspace.make(directory / "work", "other", 1) as other,
    ):
        stage = Stage(secrets, place, other, spawner)
        launch.MAX_PROCESSES = _MAX_PROCESSES
        for column, sandbox in (("plain", None), ("none", PlainProcess()), ("wall", wall)):
            found[column] |= stage.attacked(column, sandbox)
            for lone in ATTACKS:
                if lone.alone and lone.tried_as(secrets.targets["user"]):
                    found[column] |= stage.attacked(f"{column}-alone", sandbox, lone.name)
    spawner.close()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
