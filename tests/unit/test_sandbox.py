"""What is decided before a child starts: whether there is a wall, and what is let through it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rvmcv_worker import launch, mounts
from rvmcv_worker.child_log import ChildLog, harmless, harmless_text
from rvmcv_worker.config import LimitSettings, SandboxSettings
from rvmcv_worker.errors import InternalError
from rvmcv_worker.sandbox import Bubblewrap, MissingWall, PlainProcess, SandboxUnavailableError, choose


def programs(tmp_path: Path, names: tuple[str, ...]) -> str:
    for name in names:
        (tmp_path / name).symlink_to(launch.tool(name))
    return str(tmp_path)


def test_without_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path, ("choom", "prlimit", "setpriv")))
    with pytest.raises(SandboxUnavailableError, match="apt install bubblewrap"):
        choose(SandboxSettings(mode="required"))
    assert isinstance(choose(SandboxSettings(mode="auto")), PlainProcess)


def test_without_util_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path, ("choom",)))
    with pytest.raises(SandboxUnavailableError, match="prlimit is not installed: apt install util-linux"):
        launch.launcher()


def test_a_missing_wall_starts_nothing() -> None:
    with pytest.raises(InternalError, match="no wall"):
        MissingWall().start(["true"])


@pytest.mark.parametrize("directory", ["/", "/home", "/etc", "/var", str(Path.home())])
def test_python_right_in_a_directory_that_holds_more(directory: str) -> None:
    with pytest.raises(SandboxUnavailableError, match="install into a venv"):
        mounts.python_mounts([Path(directory)], [])


def test_mounts_are_not_repeated_and_hold_what_is_to_be_hidden(tmp_path: Path) -> None:
    state = tmp_path / "venv" / "state"
    state.mkdir(parents=True)
    shown = [tmp_path / "venv" / "lib", tmp_path / "venv", tmp_path / "venv", Path("/usr/lib/python3")]
    options = mounts.python_mounts(shown, [state, tmp_path / "elsewhere"])
    venv = str(tmp_path / "venv")
    assert options == ["--ro-bind", venv, venv, "--tmpfs", str(state), "--remount-ro", str(state)]


def test_root_keeps_the_windows_to_pci_devices_from_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tmp_path / "0000:00:01.0" / "0000:65:00.0"
    (card / "power").mkdir(parents=True)
    modes = {"resource1": 0o600, "rom": 0o600, "vendor": 0o444, "remove": 0o200, "power/control": 0o644}
    for name, mode in modes.items():
        (card / name).touch()
        (card / name).chmod(mode)
    (card / "link").symlink_to("rom")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert set(mounts._windows(tmp_path)) == {card / "resource1", card / "rom"}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert list(mounts._windows(tmp_path)) == []


def test_the_interpreter_is_found_through_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "cpython-3.10.1"
    (real / "bin").mkdir(parents=True)
    (real / "bin" / "python3").write_text("")
    (tmp_path / "cpython-3.10").symlink_to(real)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.symlink_to(tmp_path / "cpython-3.10" / "bin" / "python3")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "base_prefix", str(real))
    assert {tmp_path / "venv", tmp_path / "cpython-3.10", real} <= set(mounts.python_directories())


def test_an_older_bubblewrap_is_not_asked_for_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho 'usage: bwrap --tmpfs DEST --unshare-all' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    wall = Bubblewrap()
    options = [*wall._namespaces(), *wall._system(LimitSettings())]
    assert "--disable-userns" not in options
    assert "--size" not in options
    assert options[options.index("/dev/shm") - 1] == "--tmpfs"


def test_the_environment_is_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = launch.environment(tmp_path, [], walled=True)
    assert "CREDENTIALS_DIRECTORY" not in environment
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in launch.environment(tmp_path, [1], walled=True)
    assert launch.environment(tmp_path, [1, 3], walled=False)["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert "PYTORCH_ALLOC_CONF" not in environment


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_installed_torch_knows_the_limit_of_gpu_memory(tmp_path: Path, name: str) -> None:
    setting = launch.environment(tmp_path, [0], gpu_memory_fraction=0.9, walled=True)[name]
    assert setting == "per_process_memory_fraction:0.9000"
    read = [sys.executable, "-c", "import torch; print(torch._C._accelerator_getAllocatorSettings())"]

    def run(value: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(read, env={name: value}, capture_output=True, text=True, check=False)

    assert run(setting).stdout.strip() == setting
    assert "Unrecognized key" in run("no_such_key:1").stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \N{LATIN SMALL LETTER E WITH ACUTE}", "plain \N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\tb", "a    b"),
        ("forged\nline", "forged\\nline"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800 alone", "\\ud800 alone"),
        ("\x9b31m", "\\x9b31m"),
        ("x" * 10, "x" * 5 + " … (cut)"),
    ],
)
def test_a_strangers_text_is_made_harmless(text: str, shown: str) -> None:
    assert harmless(text, 5 if text.startswith("xx") else 100) == shown


def test_a_text_keeps_its_lines() -> None:
    assert harmless_text("a\x07\nb\r\nc") == "a\\x07\nb\nc"


def test_a_log_is_the_same_however_it_is_cut(tmp_path: Path) -> None:
    text = b"first\n\n50%\r100%\nlast without an end"
    for step in (1, 3, 100):
        log = ChildLog(tmp_path / f"log{step}", 1000)
        for start in range(0, len(text), step):
            log.feed(text[start : start + step])
        log.close()
        assert log.tail == "first\n\n100%\nlast without an end"
        assert (tmp_path / f"log{step}").read_text() == log.tail + "\n"


def test_a_log_goes_on_after_that_of_an_earlier_child_under_one_cap(tmp_path: Path) -> None:
    for text in (b"first child\n", b"second child\n", b"x" * 200 + b"\nthe end\n"):
        log = ChildLog(tmp_path / "log", 100)
        log.feed(text)
        log.close()
    shown = (tmp_path / "log").read_text()
    assert shown.startswith("first child\nsecond child\nxxx")
    assert len(shown.partition("\n… cut")[0]) <= 100
    log = ChildLog(tmp_path / "log", 100)
    log.feed(b"nothing fits any more\nbut the end\n")
    log.close()
    assert (tmp_path / "log").read_text().endswith("the last lines:\nnothing fits any more\nbut the end\n")


def test_a_line_without_end_is_shown_in_pieces(tmp_path: Path) -> None:
    log = ChildLog(tmp_path / "log", 10_000_000)
    for _ in range(50):
        log.feed(b"x" * 1000)
    log.close()
    assert all(len(line) < 5000 for line in log.tail.splitlines())
    assert (tmp_path / "log").stat().st_size < 50_000
