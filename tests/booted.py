"""A Debian system that is really booted, by systemd-nspawn, with this machine on its only wire.

It has a network namespace of its own with one veth, whose other end is here: a server at `host_address` is
reached, and nothing else. Whatever ends this process ends all of it: no interface, mount or process stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import selectors
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.worker_process import eventually

_BOOT_S, _OFF_S, _COMMAND_S, _LINE_S = 60.0, 150.0, 120.0, 30.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Holds the network namespace until its input ends, which the end of this process brings about.
_HOLD = "ip link set lo up && echo up && exec cat"
#: Enters the cgroups of the files named up to "--", then runs the rest.
_ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1"; shift; done; shift; exec "$@"'
#: systemd-nspawn leaves a directory in /run where that is on a disk.
_OWN_RUN = 'mount -t tmpfs tmpfs /run && exec "$@"'
_CGROUPS = Path("/sys/fs/cgroup")
#: How systemd-nspawn with `--keep-unit` ends when what it has booted wants to be booted again.
_REBOOT = 133

#: A line of the journal, by field.
Line = dict[str, Any]


class Booted:
    """One system: on from `__enter__` to `__exit__`, unless it is switched off between."""

    def __init__(self, root: Path) -> None:
        self.root = root
        number = secrets.randbits(16)
        base = f"10.213.{number >> 8}"
        self.name = f"rvmcv{number:04x}"  # an interface's name is short
        #: Where a server of the test listens, and where the system is.
        self.host_address, self.address = (f"{base}.{(number & 0xFC) + last}" for last in (1, 2))

    def __enter__(self) -> Booted:
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="rvmcv-booted-"))
            self._notify_path = Path(directory) / "notify"
            self._console = stack.enter_context((Path(directory) / "console").open("w+b"))
            self._booted = stack.enter_context(_boots(self._notify_path))
            self._holder = stack.enter_context(_network(self.name, self.host_address, self.address))
            self._cgroups = stack.enter_context(_cgroups(self.name))
            stack.callback(self.cut_power)
            self.switch_on()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def switch_on(self) -> None:
        """Boot; returns once systemd has started all that it starts."""
        nspawn = [
            "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", "--notify-ready=yes",
            "--console=pipe", "--network-namespace-path=/proc/self/ns/net", "--resolv-conf=off",
            "--timezone=off", "--link-journal=no", f"--machine={self.name}", f"--directory={self.root}",
        ]  # fmt: skip
        # In a PID namespace of its own: with its first process all of it is dead, however it ends.
        alone = ["unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
        alone += ["sh", "-c", _OWN_RUN, "sh", *nspawn]
        inside = ["nsenter", f"--net=/proc/{self._holder}/ns/net", *alone]
        with contextlib.suppress(queue.Empty):
            while True:
                self._booted.get_nowait()  # each daemon-reload of the boot before said so too
        entered = ["sh", "-c", _ENTER, "sh", *map(str, self._cgroups), "--", *inside]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *entered],
            env={"PATH": _PATH, "NOTIFY_SOCKET": str(self._notify_path)},
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=subprocess.STDOUT,
        )
        self._wait_booted()

    def switch_off(self) -> None:
        """Shut down in order; returns once it is off."""
        self.run(["systemctl", "poweroff", "--no-block"])
        assert self._process.wait(_OFF_S) == 0, self._told()

    def cut_power(self) -> None:
        """End every process of it at once, as it is."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children():
                child.kill()  # the first process of its PID namespace
        self._process.wait(30)

    def reboot(self) -> None:
        """Reboot in order; returns once it is up again."""
        self.run(["systemctl", "reboot", "--no-block"])
        assert self._process.wait(_OFF_S) == _REBOOT, self._told()
        self.switch_on()

    def run(
        self, argv: list[str], *, check: bool = True, timeout_s: float = _COMMAND_S, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root inside, `text` on its standard input."""
        done = subprocess.run(
            self._inside(argv),
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env={"PATH": _PATH},
        )
        if check and done.returncode:
            raise AssertionError(f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def ask(self, argv: list[str]) -> str:
        """Run a command inside and return what it prints."""
        return self.run(argv).stdout.strip()

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file inside; one that is secret never has a moment of being open to others."""
        self.run(["sh", "-c", 'umask 077; mkdir -p "${1%/*}"; cat > "$1.new"', "sh", path], text=text)
        self.run(["sh", "-c", 'chmod "$2" "$1.new" && mv "$1.new" "$1"', "sh", path, f"{mode:o}"])

    def read(self, path: str) -> str:
        """Return what is in a file inside."""
        return self.run(["cat", path]).stdout

    def inside(self, path: str) -> Path:
        """Return where this machine sees a path of the system's disk."""
        return self.root / path.lstrip("/")

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.ask(["systemctl", "show", "--value", "--property", name, unit])

    def state(self, unit: str) -> str:
        """Return a unit's state: active, activating, failed, …"""
        return self.show(unit, "ActiveState")

    def cursor(self) -> str:
        """Return the journal's end, from where later lines can be asked for."""
        lines = self.journal(last=1)
        return str(lines[0]["__CURSOR"]) if lines else ""

    def journal(self, *, unit: str | None = None, after: str = "", last: int | None = None) -> list[Line]:
        """Return the journal's lines, those of all boots."""
        more = ["--lines", str(last)] if last else []
        out = self.run([*_journalctl(unit, after), *more]).stdout
        return [line for text in out.splitlines() if (line := json.loads(text))["__CURSOR"] != after]

    def wait_line(
        self,
        holds: Callable[[Line], object],
        *,
        unit: str | None = None,
        after: str = "",
        within_s: float = _LINE_S,
    ) -> Line:
        """Return the first line after `after` for which `holds` is true, once it is there."""
        argv = [*_journalctl(unit, after), "--follow", "--no-tail"]
        with _following(self._inside(argv)) as lines:
            for text in lines(within_s):
                line: Line = json.loads(text)
                if line["__CURSOR"] != after and holds(line):
                    return line
        told = "\n".join(str(line.get("MESSAGE")) for line in self.journal(unit=unit, after=after)[-30:])
        raise AssertionError(f"no such line within {within_s} s; the last are:\n{told}")

    def wait_state(self, unit: str, state: str, within_s: float = 60.0) -> None:
        """Wait until a unit is in a state: systemd tells it to nobody who is not on its bus."""
        eventually(lambda: self.state(unit) == state, within_s, 0.1)

    def _inside(self, argv: list[str]) -> list[str]:
        return ["nsenter", "--all", "--target", str(self._init), "--", *argv]

    def _wait_booted(self) -> None:
        """Wait for systemd-nspawn to pass on that systemd is up."""
        try:
            self._booted.get(timeout=_BOOT_S)
        except queue.Empty:
            raise AssertionError(f"not booted within {_BOOT_S} s:\n{self._told()}") from None
        self._init = self._find_init()

    def _told(self) -> str:
        """Return the last that was on the console."""
        self._console.seek(0)
        return self._console.read()[-3000:].decode(errors="replace")

    def _find_init(self) -> int:
        """Return the process that is number 1 inside: two PID namespaces lie around it."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
                if len(numbers) == 3 and numbers[-1] == "1":
                    return process.pid
        raise AssertionError("systemd is not there")


def _journalctl(unit: str | None, after: str) -> list[str]:
    argv = ["journalctl", "--output=json", "--no-pager", "--quiet", "--all"]
    # Not --after-cursor: beside --unit it leaves out the first line of the unit's too. The line at the cursor
    # is left out by who reads.
    return argv + (["--unit", unit] if unit else []) + ([f"--cursor={after}"] if after else [])


@contextlib.contextmanager
def _following(argv: list[str]) -> Iterator[Callable[[float], Iterator[str]]]:
    """Run a command that prints lines for ever; gives what yields them for a number of seconds."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env={"PATH": _PATH})
    assert process.stdout is not None
    pipe = process.stdout.fileno()

    def lines(within_s: float) -> Iterator[str]:
        deadline_s, rest = time.monotonic() + within_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while selector.select(max(0.0, deadline_s - time.monotonic())):
                if not (read := os.read(pipe, 1 << 16)):
                    return
                *whole, rest = (rest + read).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)

    try:
        yield lines
    finally:
        # The command is nsenter's child, and must not outlive it: the system's own init could not reap it.
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.communicate()


@contextlib.contextmanager
def _boots(path: Path) -> Iterator[queue.SimpleQueue[None]]:
    """Take what systemd-nspawn passes on of the systemd in it; yields one item a boot.

    All of it is read, for as long as it runs: systemd waits while one message more does not fit.
    """
    booted: queue.SimpleQueue[None] = queue.SimpleQueue()

    def read() -> None:
        while message := notified.recv(1 << 16):
            if b"READY=1" in message.splitlines():
                booted.put(None)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(path))
        reader = threading.Thread(target=read, name="booted-notify", daemon=True)
        reader.start()
        try:
            yield booted
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
                end.sendto(b"", str(path))
            reader.join()


@contextlib.contextmanager
def _network(name: str, here: str, there: str) -> Iterator[int]:
    """Make a network namespace with one wire to it; yields a process that is in it."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"up\n", "no network namespace can be made"
        wire = ["link", "add", name, "type", "veth", "peer", "name", "host0", "netns", str(holder.pid)]
        enter = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        for argv in (
            ["ip", *wire],
            ["ip", "address", "add", f"{here}/30", "dev", name],
            ["ip", "link", "set", name, "up"],
            [*enter, "ip", "address", "add", f"{there}/30", "dev", "host0"],
            [*enter, "ip", "link", "set", "host0", "up"],
        ):
            subprocess.run(argv, check=True)
        yield holder.pid
    finally:
        holder.communicate()  # its input ends, so it does; the wire goes with the namespace


@contextlib.contextmanager
def _cgroups(name: str) -> Iterator[list[Path]]:
    """Make cgroups of its own, so that two systems do not share one; yields the files by which to enter."""
    places = [_CGROUPS / "systemd", _CGROUPS / "unified", _CGROUPS]
    made = [place / f"{name}-{os.getpid()}" for place in places if (place / "cgroup.procs").exists()]
    for cgroup in made:
        for old in cgroup.parent.glob("rvmcv*-*"):
            if not psutil.pid_exists(int(old.name.rpartition("-")[2])):
                _remove(old)  # of a run that was killed: a cgroup outlives its processes
        cgroup.mkdir()
    try:
        yield [cgroup / "cgroup.procs" for cgroup in made]
    finally:
        for cgroup in made:
            _remove(cgroup)


def _remove(cgroup: Path) -> None:
    for directory, _, _ in os.walk(cgroup, topdown=False):
        Path(directory).rmdir()
