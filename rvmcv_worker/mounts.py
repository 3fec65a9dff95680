"""What a child finds behind the wall, as bubblewrap's options; whatever is not named here is not there.

And what it may touch where there is only Landlock: the same, as far as that can tell.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import rvmcv_worker
from rvmcv_worker.errors import InternalError
from rvmcv_worker.landlock import Ruleset
from rvmcv_worker.launch import SandboxUnavailableError
from rvmcv_worker.workspace import Workspace

#: The private in-memory directories.
TMP = Path("/tmp")  # noqa: S108 - behind the wall it is the child's alone
SHM = Path("/dev/shm")  # noqa: S108

_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/alternatives")
#: Directories that hold more than an interpreter.
_TOO_MUCH = ("/", "/etc", "/home", "/opt", "/root", "/run", "/srv", "/tmp", "/var")  # noqa: S108 - not written to
#: More of /etc for a child that has not got a made-up one.
_ETC_UNWALLED = ("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/hosts")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
_SYS = ("/sys/devices/system/cpu", "/sys/devices/system/node")


def system_mounts(tmpfs_bytes: Mapping[Path, int], *, can_size: bool) -> list[str]:
    """Mount a system reduced to what Python needs, and empty in-memory directories of at most these sizes."""
    options = ["--ro-bind", "/usr", "/usr"]
    for name in _SYSTEM:
        path = Path("/", name)
        if path.is_symlink():
            options += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    # A daemon that is root stays the owner of /proc/sys inside, and a job could set core_pattern.
    options += ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"]
    for path in _private_tables():
        options += ["--ro-bind", "/dev/null", str(path)]
    for directory, size in tmpfs_bytes.items():
        options += [*(("--size", str(size)) if can_size else ()), "--tmpfs", str(directory)]
    for name in (*_ETC, *_SYS):
        options += ["--ro-bind-try", name, name]
    return options


def _private_tables() -> list[Path]:
    """Return what /proc shows of the whole machine to its owner, which a daemon that is root stays."""
    if os.geteuid() != 0:
        return []
    return [path for path in Path("/proc").iterdir() if path.is_file() and not path.stat().st_mode & 0o004]


def gpu_mounts(gpus: Sequence[int]) -> list[str]:
    """Mount the devices of these GPUs; raises `InternalError` when one is not there."""
    if not gpus:
        return []
    options: list[str] = []
    for path in _cards(gpus):
        if not Path(path).exists():
            raise InternalError(
                f"{path} is not there: run `nvidia-modprobe -u` as root, and `nvidia-smi` to check"
            )
        options += ["--dev-bind", path, path]
    for path in ("/dev/nvidia-uvm-tools", "/sys/bus/pci", "/sys/module/nvidia", "/sys/module/nvidia_uvm"):
        options += ["--dev-bind-try" if path.startswith("/dev") else "--ro-bind-try", path, path]
    for pci in sorted(Path("/sys/devices").glob("pci*")):  # what the links in /sys/bus/pci lead to
        options += ["--ro-bind", str(pci), str(pci)]
        for window in _windows(pci):
            options += ["--ro-bind", "/dev/null", str(window)]
    return options


def _windows(pci: Path) -> Iterator[Path]:
    """Yield what of PCI devices none but their owner may read, which a daemon that is root stays inside.

    They lead to registers and memory of the devices: other jobs' cards, disks and networks too.
    """
    if os.geteuid() != 0:
        return
    with os.scandir(pci) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name.count(":") == 2:  # as in 0000:65:00.0; others hold no device
                    yield from _windows(Path(entry.path))
            elif entry.is_file(follow_symlinks=False) and entry.stat().st_mode & 0o404 == 0o400:
                yield Path(entry.path)


def _cards(gpus: Sequence[int]) -> list[str]:
    return [*(f"/dev/nvidia{number}" for number in gpus), "/dev/nvidiactl", "/dev/nvidia-uvm"] if gpus else []


def job_mounts(workspace: Workspace, writable: str, readable: Sequence[str]) -> list[str]:
    """Mount the job's directories at `/job`."""
    options = ["--dir", "/job"]
    for name in ("in", *readable):
        options += ["--ro-bind", str(workspace.root / name), f"/job/{name}"]
    return [*options, "--bind", str(workspace.child_dir(writable)), f"/job/{writable}"]


def python_directories() -> list[Path]:
    """Return where the interpreter and this package lie, with every link on the way to the interpreter."""
    found = [
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(sys.prefix).resolve(),
        Path(sys.base_prefix).resolve(),
    ]
    hop = Path(sys.executable)
    while hop.is_symlink():
        hop = Path(os.path.normpath(hop.parent / hop.readlink()))
        found.append(hop.parent.parent)  # PREFIX/bin/python; the prefix itself may be a link
    # The package alone and not its parent: of an editable install that is the whole working tree.
    package = Path(rvmcv_worker.__file__).parent
    return [*found, package, package.resolve()]


def python_mounts(directories: Sequence[Path], hide: Sequence[Path]) -> list[str]:
    """Mount `directories` read-only, without what lies below `hide`; raises `SandboxUnavailableError`."""
    too_much = set(map(Path, _TOO_MUCH))
    with contextlib.suppress(RuntimeError):  # a user without an entry in /etc/passwd has no home
        too_much.add(Path.home())
    mounted = [Path("/usr")]
    options: list[str] = []
    for path in sorted(set(directories), key=lambda path: len(path.parts)):
        if any(path.is_relative_to(above) for above in mounted):
            continue
        if path in too_much:
            raise SandboxUnavailableError(
                f"Python lies right in {path}, which no job may see: install into a venv"
            )
        mounted.append(path)
        options += ["--ro-bind", str(path), str(path)]
    for path in hide:
        if any(path.is_relative_to(above) for above in mounted) and path.is_dir():
            options += ["--tmpfs", str(path), "--remount-ro", str(path)]
    return options


def ruleset(
    workspace: Workspace,
    writable: str,
    readable: Sequence[str],
    python: Sequence[Path],
    gpus: Sequence[int],
    *,
    tcp: bool,
) -> Ruleset:
    """Return what a child without a wall may touch."""
    system = ["/usr", *(f"/{name}" for name in _SYSTEM), *_ETC, *_ETC_UNWALLED, "/proc", "/sys"]
    job = [str(workspace.root / name) for name in ("in", *readable)]
    return Ruleset(
        readable=(*system, *map(str, python), *job),
        writable=(str(workspace.child_dir(writable)), str(SHM)),
        devices=(*_DEVICES, *_cards(gpus)),
        # Python looks for this package by listing the directory that it lies in.
        listable=(str(Path(rvmcv_worker.__file__).parents[1]),),
        tcp=tcp,
    )
