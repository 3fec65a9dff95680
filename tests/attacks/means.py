"""More of the machine than a job's share."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
from pathlib import Path
from typing import Any

from tests.attacks.attack import LIBC, attack, syscall

_MIB = 1024 * 1024


def _fill(directory: str, targets: dict[str, Any]) -> str:
    path = f"{directory}/fill-{os.getpid()}"
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(fd, 0, targets["fill_bytes"])
        if targets["walled"]:
            signal.pause()  # until it is ended for it
        return f"{targets['fill_bytes'] // _MIB} MiB"
    finally:
        os.close(fd)
        os.unlink(path)


@attack("fill /dev/shm", needs="500 MB in /dev/shm", alone=True)
def _fill_shm(targets: dict[str, Any]) -> str:
    return _fill("/dev/shm", targets)


@attack("fill /tmp", needs="500 MB in /tmp", alone=True)
def _fill_tmp(targets: dict[str, Any]) -> str:
    return _fill("/tmp", targets)


@attack("take the disk by files that it has removed and holds open", alone=True)
def _unlinked(targets: dict[str, Any]) -> str:
    held = []
    for number in range(2):
        path = f"{targets['own']}/unlinked-{number}"
        held.append(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        os.unlink(path)
        os.posix_fallocate(held[-1], 0, targets["fill_bytes"])
    if targets["walled"]:
        signal.pause()  # until it is ended for it
    return f"{len(held) * targets['fill_bytes'] // _MIB} MiB"


@attack("hide a file that it has removed behind many others", alone=True)
def _behind_many(targets: dict[str, Any]) -> str:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for _ in range(min(most, 8192) - 50):
        os.open("/dev/null", os.O_RDONLY)
    return _unlinked(targets)


@attack("hide the files that it has removed and holds open", alone=True)
def _hidden_files(targets: dict[str, Any]) -> str:
    not_dumpable = LIBC.prctl(4, 0, 0, 0, 0) == 0  # /proc/PID/fd is root's from here on
    if targets["walled"]:
        if targets["user"] == "root":
            raise OSError(errno.EPERM, "nothing is hidden from root")
        signal.pause()  # until it is ended for it
    return "hidden" if not_dumpable else ""


@attack("hold memory in files without a name (memfd)", alone=True)
def _memfd(targets: dict[str, Any]) -> str:
    fd = os.memfd_create("hostile")
    os.posix_fallocate(fd, 0, targets["fill_bytes"])
    if targets["walled"]:
        signal.pause()  # until it is ended for it
    return f"{targets['fill_bytes'] // _MIB} MiB"


@attack("hold memory in the tables of memory that it never has", alone=True)
def _page_tables(targets: dict[str, Any]) -> str:
    covered, length = 2 * _MIB, 2**46  # bytes that one table maps; most that a process may map is twice that
    private, anonymous, no_reserve = 0x2, 0x20, 0x4000
    LIBC.mmap.restype = ctypes.c_void_p
    flags = private | anonymous | no_reserve
    start = LIBC.mmap(None, ctypes.c_size_t(length), mmap.PROT_READ, flags, -1, ctypes.c_long(0))
    if start in {None, ctypes.c_void_p(-1).value}:
        raise OSError(ctypes.get_errno(), "no mapping")
    for number in range(targets["fill_bytes"] // 4096 if targets["walled"] else 100):
        ctypes.string_at(start + number * covered, 1)
    if targets["walled"]:
        signal.pause()  # until it is ended for it
    return "tables"


@attack("hold memory in no process (System V)")
def _system_v(_: dict[str, Any]) -> str:
    private, mode, remove = 0, 0o600, 0
    number = syscall(29, ctypes.c_long(private), ctypes.c_size_t(_MIB), ctypes.c_long(0o1000 | mode))
    syscall(31, ctypes.c_long(number), ctypes.c_long(remove), None)
    return "a segment"


@attack("leave a message queue in the kernel", needs="POSIX message queues")
def _queue(_: dict[str, Any]) -> str:
    name = f"rvmcv-hostile-{os.getpid()}".encode()
    create = ctypes.c_long(os.O_CREAT | os.O_RDWR)
    queue = syscall(240, name, create, ctypes.c_long(0o600), None)
    os.close(queue)
    syscall(241, name)
    return "a queue"


@attack("take the machine's contexts of asynchronous I/O", needs="a kernel with AIO")
def _aio(_: dict[str, Any]) -> str:
    context = ctypes.c_ulong(0)
    syscall(206, ctypes.c_long(64), ctypes.byref(context))
    return "a context"


@attack("make a file of 10 TB", needs="a file system that can")
def _sparse(targets: dict[str, Any]) -> str:
    path = Path(targets["own"], "sparse")
    try:
        with path.open("wb") as file:
            file.truncate(10 * 1024**4)
        return "10 TB"
    finally:
        path.unlink()


@attack("have more than its limits", by="root")
def _limits(_: dict[str, Any]) -> str:
    raised = []
    for name in ("CORE", "FSIZE", "NPROC"):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (resource.RLIM_INFINITY,) * 2)
        except (OSError, ValueError):
            continue
        raised.append(name)
    return " ".join(raised)


@attack("make the kernel kill others first when memory runs out")
def _oom_score(_: dict[str, Any]) -> str:
    Path("/proc/self/oom_score_adj").write_text("0")
    return "oom_score_adj is 0"


@attack("run before all others", by="root")
def _realtime(_: dict[str, Any]) -> str:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return "SCHED_FIFO"
