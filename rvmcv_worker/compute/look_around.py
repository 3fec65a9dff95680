"""What can be seen and done from here, as JSON: `rvmcv-worker doctor --sandbox` starts it in a job's place.

It looks, and it tries: whether a file can be made is found out by making it, and each system call is made,
in a process of its own, with arguments that come to nothing even for root.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rvmcv_worker import kernel, seccomp

#: How much of a long list is told.
_MOST = 200
#: System calls with their arguments. Those that are let through fail all the same, or change nothing.
_CALLS: dict[str, tuple[int | None, ...]] = {
    "ptrace": (16, 0, 0, 0),
    "process_vm_readv": (0, None, 0, None, 0, 0),
    "process_vm_writev": (0, None, 0, None, 0, 0),
    "pidfd_getfd": (-1, 0, 0),
    "keyctl": (0, -3, 0),
    "add_key": (None, None, None, 0, 0),
    "request_key": (None, None, None, 0),
    "mount": (None, None, None, 0, None),
    "umount2": (None, 0),
    "pivot_root": (None, None),
    "open_tree": (-1, None, 0),
    "move_mount": (-1, None, -1, None, 0),
    "fsopen": (None, 0),
    "open_by_handle_at": (-1, None, 0),
    "unshare": (0x10000000,),  # CLONE_NEWUSER
    "setns": (-1, 0),
    "clone": (0x10000011, 0, 0, 0, 0),  # CLONE_NEWUSER, SIGCHLD
    "clone3": (None, 0),
    "shmget": (1, 0, 0),
    "msgget": (1, 0),
    "semget": (1, 0, 0),
    "mq_open": (None, 0, 0, None),
    "io_setup": (0, None),
    "bpf": (-1, None, 0),
    "userfaultfd": (-1,),
    "perf_event_open": (None, 0, -1, -1, 0),
    "io_uring_setup": (0, None),
    "finit_module": (-1, None, 0),
    "delete_module": (None, 0),
    "kexec_load": (0, 1, None, 0xFFFFFFFF),
    "personality": (0x0040000,),  # ADDR_NO_RANDOMIZE
    "ioctl": (-1, 0x5412, 0),  # TIOCSTI
    "fcntl": (-1, 0x400, 0),  # F_SETLEASE
    "prlimit64": (1, 0, None, None),
}
#: Families of sockets by number, with a type that each of them has.
_FAMILIES = {
    "UNIX": (1, socket.SOCK_STREAM),
    "INET": (2, socket.SOCK_STREAM),
    "INET6": (10, socket.SOCK_STREAM),
    "NETLINK": (16, socket.SOCK_RAW),
    "PACKET": (17, socket.SOCK_RAW),
    "RDS": (21, socket.SOCK_SEQPACKET),
    "CAN": (29, socket.SOCK_RAW),
    "TIPC": (30, socket.SOCK_DGRAM),
    "BLUETOOTH": (31, socket.SOCK_RAW),
    "ALG": (38, socket.SOCK_SEQPACKET),
    "VSOCK": (40, socket.SOCK_STREAM),
    "QIPCRTR": (42, socket.SOCK_DGRAM),
    "XDP": (44, socket.SOCK_RAW),
}
_LIMITS = {"open files": resource.RLIMIT_NOFILE, "processes": resource.RLIMIT_NPROC}
_LIMITS |= {"file size": resource.RLIMIT_FSIZE, "core dump": resource.RLIMIT_CORE}
_KNOWN_DEVICES = (
    *("null", "zero", "full", "random", "urandom", "tty", "ptmx", "kmsg", "mem", "kvm", "fuse"),
    *("nvidiactl", "nvidia-uvm", "nvidia-modeset", *(f"nvidia{number}" for number in range(16))),
)
#: What a call answers that is not let through, by the filter or for want of a right.
_REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EAFNOSUPPORT, errno.ESOCKTNOSUPPORT)


def look() -> dict[str, Any]:
    """Return everything."""
    return {
        "user": _user(),
        "processes": _processes(),
        "files": {place: _names(place) for place in ("/", "/etc", "/job", "/home", "/root", "/var", "/run")},
        "writable": _writable(),
        "network": {"interfaces": [name for _, name in socket.if_nameindex()], "sockets": _sockets()},
        "devices": _devices(),
        "calls": _calls(),
        "limits": {name: _limit(kind) for name, kind in _LIMITS.items()},
        "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
        "environment": sorted(os.environ),
    }


def _user() -> dict[str, Any]:
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {
        "uid": os.getuid(),
        "gid": os.getgid(),
        "capabilities": status["CapEff"],
        "no_new_privileges": status["NoNewPrivs"] == "1",
        "seccomp_filters": int(status.get("Seccomp_filters", 0)),
    }


def _processes() -> list[str]:
    found = []
    for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            found.append(f"{pid} {os.fsdecode(b' '.join(words[:3]))[:100].strip()}")
    return found[:_MOST]


def _names(place: str) -> list[str] | None:
    """Return what lies in a directory; None where there is none, or none to be read."""
    with contextlib.suppress(OSError):
        return sorted(path.name for path in Path(place).iterdir())[:_MOST]
    return None


def _writable() -> list[dict[str, Any]]:
    """Find where a file can be made, among all that is mounted, beneath the root, and the job's own."""
    places = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    places |= {f"/{name}" for name in _names("/") or []} | {"/var/tmp", "/var/lib", str(Path.home().parent)}  # noqa: S108
    places |= {str(path) for path in Path.cwd().glob("*")} | {str(Path.cwd()), "/dev/shm"}  # noqa: S108
    found = []
    for place in sorted(places):
        probe = Path(place, f".look-around-{os.getpid()}")
        with contextlib.suppress(OSError, ValueError):
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            probe.unlink()
            size = os.statvfs(place)
            free_bytes, bytes_ = size.f_bavail * size.f_frsize, size.f_blocks * size.f_frsize
            found.append({"path": place, "bytes": bytes_, "free_bytes": free_bytes})
    return found[:_MOST]


def _sockets() -> dict[str, str]:
    return {
        name: _answer(lambda family, kind: socket.socket(family, kind).close(), *arguments)
        for name, arguments in _FAMILIES.items()
    }


def _devices() -> list[str]:
    """Return the devices that can be opened."""
    found = []
    # Where /dev cannot be listed, by the names that are worth a try.
    known = {Path("/dev", name) for name in _KNOWN_DEVICES}
    for path in sorted(known | set(Path("/dev").rglob("*"))):
        with contextlib.suppress(OSError):
            if path.is_symlink() or not (path.is_char_device() or path.is_block_device()):
                continue
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
            found.append(str(path))
    return found[:_MOST]


def _calls() -> dict[str, str]:
    machine = seccomp.MACHINES.get(platform.machine())
    numbers = machine.refused | machine.judged if machine else {}
    return {name: _try(numbers[name], _CALLS[name]) for name in _CALLS if name in numbers}


def _try(number: int, arguments: tuple[int | None, ...]) -> str:
    """Make a call in a process of its own, which it may change or end."""
    read_fd, write_fd = os.pipe()
    if (pid := os.fork()) == 0:
        # A `clone` that is let through returns twice; both say the same.
        os.write(write_fd, _answer(kernel.call, number, *map(kernel.word, arguments)).encode())
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as file:
        told = file.read(100).decode()
    _, status = os.waitpid(pid, 0)
    return told.partition(")")[0] + ")" if told else f"refused (killed by signal {os.WTERMSIG(status)})"


def _answer(make: Callable[..., object], *arguments: object) -> str:
    try:
        make(*arguments)
    except OSError as error:
        code = error.errno or 0
        kind = "refused" if code in _REFUSALS else "let through"
        return f"{kind} ({errno.errorcode.get(code, str(code))})"
    return "let through (done)"


def _limit(kind: int) -> int | None:
    value = resource.getrlimit(kind)[0]
    return None if value == resource.RLIM_INFINITY else value


if __name__ == "__main__":
    json.dump(look(), sys.stdout)
