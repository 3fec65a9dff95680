"""What a job sees and may do, asked from inside: as a plain process, behind the wall, with Landlock alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rvmcv_worker import landlock, launch
from rvmcv_worker.cli import app
from rvmcv_worker.config import SandboxSettings
from rvmcv_worker.sandbox import Bubblewrap, PlainProcess, Sandbox, choose, try_out
from tests.child_fixtures import wall

__all__ = ["wall"]

pytestmark = pytest.mark.slow

PROBE = (*launch.PYTHON, "-m", "rvmcv_worker.compute.look_around")
needs_landlock = pytest.mark.skipif(
    not landlock.version(), reason="this kernel has no Landlock, or not switched on"
)

#: What Ubuntu 22.04's bubblewrap 0.6.1 does not know: said in its help by no word, refused when given.
OLD_BUBBLEWRAP = """#!/bin/sh
if [ "$*" = --help ]; then
    {bwrap} --help | grep -v -e --disable-userns -e --assert-userns -e --size
    exit
fi
for word; do
    case $word in
        --) break;;
        --disable-userns|--size) echo "bwrap: Unknown option $word" >&2; exit 1;;
    esac
done
exec {bwrap} "$@"
"""

#: Calls number 20 by the gate of 32-bit programs: getpid there, writev in 64 bits.
BY_THE_32_BIT_GATE = """
import ctypes, mmap, sys
code = bytes.fromhex("b814000000cd80c3")  # mov eax, 20; int 0x80; ret
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(code)
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""


def seen(sandbox: Sandbox) -> dict[str, Any]:
    trial = try_out(sandbox, PROBE)
    assert not trial.error
    found: dict[str, Any] = json.loads(trial.output)
    return found


def let_through(answers: dict[str, str]) -> set[str]:
    return {name for name, answer in answers.items() if answer.startswith("let through")}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """What a program sees that is started as any other."""
    run = subprocess.run(PROBE, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def walled(wall: Bubblewrap) -> dict[str, Any]:
    return seen(wall)


def test_a_plain_process_sees_and_may_do_much(plain: dict[str, Any]) -> None:
    assert {"ptrace", "process_vm_readv", "personality", "ioctl", "clone3"} <= let_through(plain["calls"])
    assert {"INET", "UNIX"} <= let_through(plain["network"]["sockets"])
    assert len(plain["processes"]) > 2
    assert {"home", "var", "work"} & set(plain["files"]["/"])


def test_behind_the_wall_there_is_nothing_to_see_or_do(walled: dict[str, Any]) -> None:
    assert let_through(walled["calls"]) == set()
    assert let_through(walled["network"]["sockets"]) == {"UNIX", "INET", "INET6", "NETLINK"}
    assert walled["network"]["interfaces"] == ["lo"]
    assert len(walled["processes"]) == 2
    assert walled["files"]["/job"] == ["in", "probe"]
    assert not {"home", "var", "run", "boot", "opt", "mnt", "srv"} & set(walled["files"]["/"])
    assert [place["path"] for place in walled["writable"]] == ["/dev/shm", "/job/probe", "/tmp"]
    assert set(walled["devices"]) <= {
        f"/dev/{name}" for name in ("full", "null", "random", "urandom", "zero", "tty", "pts/ptmx")
    }
    assert (walled["user"]["uid"], walled["user"]["capabilities"]) == (1000, "0000000000000000")
    assert walled["user"]["seccomp_filters"] >= 1


def test_limits(walled: dict[str, Any]) -> None:
    limits = walled["limits"]
    assert limits["open files"] <= launch.MAX_OPEN_FILES
    assert limits["processes"] <= launch.MAX_PROCESSES
    assert (limits["file size"], limits["core dump"]) == (100_000_000_000, 0)
    assert walled["oom_score_adj"] == 1000
    sizes = {place["path"]: place["bytes"] for place in walled["writable"]}
    assert sizes["/tmp"] < sizes["/dev/shm"] < 40e9


def test_bubblewrap_0_6_1_protects_as_well(
    walled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "bwrap"
    old.write_text(OLD_BUBBLEWRAP.format(bwrap=shutil.which("bwrap")))
    old.chmod(0o755)
    refused = subprocess.run(
        [old, "--disable-userns", "--", "true"], capture_output=True, text=True, check=False
    )
    assert "Unknown option" in refused.stderr
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = seen(choose(SandboxSettings(mode="required")))
    for what in ("calls", "network", "devices", "files", "user", "limits"):
        assert found[what] == walled[what], what
    assert [place["path"] for place in found["writable"]] == ["/dev/shm", "/job/probe", "/tmp"]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86-64 has a second gate to the kernel")
def test_the_gate_of_32_bit_programs_is_the_end(wall: Bubblewrap) -> None:
    code = (*launch.PYTHON, "-c", BY_THE_32_BIT_GATE)
    plain = subprocess.run(code, capture_output=True, text=True, check=False)
    if plain.returncode:
        pytest.skip("this kernel runs no 32-bit programs")
    assert int(plain.stdout) > 0
    trial = try_out(wall, code)
    assert trial.error
    assert "Bad system call" in trial.output or trial.output == ""


@needs_landlock
def test_with_landlock_alone_a_job_touches_its_own_files_only(tmp_path: Path) -> None:
    found = seen(PlainProcess())
    writable = [Path(place["path"]) for place in found["writable"]]
    assert [path.name for path in writable] == ["shm", "probe"]
    assert all(names is None for names in found["files"].values())
    assert let_through(found["calls"]) == set()
    assert let_through(found["network"]["sockets"]) == {"UNIX", "NETLINK"}
    assert found["user"]["capabilities"] == "0000000000000000"
    assert found["oom_score_adj"] == 1000


def _try_each(sandbox: Sandbox, targets: Sequence[object]) -> list[bool]:
    """Return which of a token, another directory, an abstract socket and a process a job gets at."""
    code = """
import json, os, signal, socket, sys
token, directory, address, pid = json.loads(sys.argv[1])
def connect():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
def can(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True
print(json.dumps([
    can(lambda: open(token).read()),
    can(lambda: open(directory + "/planted", "w")),
    can(connect),
    can(lambda: os.kill(pid, 0)),
    can(lambda: open(f"/proc/{pid}/environ").read()),
]))
"""
    trial = try_out(sandbox, (*launch.PYTHON, "-c", code, json.dumps(targets)))
    assert not trial.error
    answers: list[bool] = json.loads(trial.output)
    return answers


@needs_landlock
def test_what_landlock_keeps_from_a_job(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a secret")
    address = f"\0rvmcv-{os.getpid()}-landlock"
    with socket.socket(socket.AF_UNIX) as server, subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        server.bind(address)
        server.listen()
        targets = (str(tmp_path / "token"), str(tmp_path), address, other.pid)
        without = PlainProcess()
        without._has_landlock = False
        # A child of root's has no capabilities even so, and `cat` has them: that protects its environment.
        assert _try_each(without, targets) == [True, True, True, True, os.getuid() != 0]
        (tmp_path / "planted").unlink()
        scoped = landlock.version() >= 6
        assert _try_each(PlainProcess(), targets) == [False, False, not scoped, not scoped, False]
        other.kill()
    assert not (tmp_path / "planted").exists()


def test_a_job_that_cannot_be_confined_is_not_started() -> None:
    run = subprocess.run(
        [*launch.PYTHON, "-m", "rvmcv_worker.confine", "0", sys.executable, "-c", "print('started')"],
        input=json.dumps({"ruleset": None, "filter": "0600000000000000"[:8]}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "started" not in run.stdout
    assert "could not be confined" in run.stderr


#: Becomes another user and hides its memory, or does not; a second process of that user looks for its secret.
LOOK_AT_ANOTHER = """
import os, signal, sys
from rvmcv_worker import kernel
def become_ordinary():
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(61234)
        os.setuid(61234)
    kernel._prctl(4, 1)  # what a change of user takes away
told_r, told_w = os.pipe()
if (victim := os.fork()) == 0:
    become_ordinary()
    if sys.argv[1] == "hidden":
        kernel.hide_memory()
    os.write(told_w, b".")
    signal.pause()
os.read(told_r, 1)
become_ordinary()
try:
    print(open(f"/proc/{victim}/environ").read().count("a-canary"))
except PermissionError:
    print("refused")
os.kill(victim, signal.SIGKILL)
"""


@pytest.mark.parametrize(("how", "found"), [("open", "1"), ("hidden", "refused")])
def test_the_daemons_memory_is_hidden_from_its_own_user(how: str, found: str) -> None:
    argv = [sys.executable, "-c", LOOK_AT_ANOTHER, how]
    run = subprocess.run(argv, env={"CANARY": "a-canary"}, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == found


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text('[server]\nurl = "http://127.0.0.1:9"\n[sandbox]\nmode = "auto"\n')
    return file


def test_doctor_shows_it(config_file: Path) -> None:
    argv = ["doctor", "--sandbox", "--config", str(config_file)]
    text = CliRunner().invoke(app, argv)
    assert text.exit_code == 0
    for row in ("wall        bubblewrap", "network     interfaces lo", "writable    /tmp: ", "ptrace"):
        assert row in text.stdout
    as_json = json.loads(CliRunner().invoke(app, [*argv, "--json"]).stdout)
    assert (as_json["wall"], as_json["open"]) == ("bubblewrap", "")
    assert let_through(as_json["calls"]) == set()


def test_doctor_says_what_is_open_without_a_wall(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("choom", "prlimit", "setpriv"):
        (tmp_path / name).symlink_to(launch.tool(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = CliRunner().invoke(app, ["doctor", "--sandbox", "--config", str(config_file)])
    assert found.exit_code == 0
    assert "(plain processes)" in found.stdout
    assert "no wall: a job" in found.stdout
    config_file.write_text(config_file.read_text().replace("auto", "required"))
    refused = CliRunner().invoke(app, ["doctor", "--sandbox", "--config", str(config_file)])
    assert refused.exit_code == 1
    assert "apt install bubblewrap" in refused.output
