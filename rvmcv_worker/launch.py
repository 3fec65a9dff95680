"""What every child starts with, wall or no wall: interpreter, environment and limits, each by list."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rvmcv_worker.config import LimitSettings

#: The interpreter as children get it: no user site, no PYTHON* variables (-I), no `__pycache__` (-B), no
#: buffer that a crash would swallow (-u), and a traceback of each thread for a segfault.
PYTHON = (sys.executable, "-I", "-B", "-u", "-X", "faulthandler")

#: Variables of the daemon's environment that a child gets too; all others stay behind.
PASSED_ON = ("TZ", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

#: Most open files, and most processes and threads of a tree (the latter has no effect for root).
MAX_OPEN_FILES = 8192
MAX_PROCESSES = 8192


class SandboxUnavailableError(Exception):
    """The wall cannot be built here; the message says why and what to do."""


def tool(name: str) -> str:
    """Return the path of a program of util-linux; raises `SandboxUnavailableError`."""
    path = shutil.which(name)
    if path is None:
        raise SandboxUnavailableError(f"{name} is not installed: apt install util-linux")
    return path


def launcher() -> list[str]:
    """Return the head of every command line; `resource_limits` come next, then the child's own.

    Limits are set by programs that turn into the child: set from outside they would come too late. The
    kernel takes the child first when memory runs out.
    """
    return [tool("choom"), "-n", "1000", "--", tool("prlimit")]


def resource_limits(limits: LimitSettings) -> list[str]:
    """Return the limits as options of `prlimit`, none above what the daemon itself may set."""

    def at_most(kind: int, wanted: int) -> int:
        hard = resource.getrlimit(kind)[1]
        return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)

    return [
        "--core=0",
        f"--nofile={at_most(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)}",
        f"--nproc={at_most(resource.RLIMIT_NPROC, MAX_PROCESSES)}",
        "--rtprio=0",  # where the daemon may be more than all others, its children may not
        "--nice=0",
        f"--fsize={at_most(resource.RLIMIT_FSIZE, int(limits.max_workspace_gb * 1e9))}",
    ]


def environment(
    home: Path, gpus: Sequence[int], *, gpu_memory_fraction: float = 1.0, walled: bool
) -> dict[str, str]:
    """Return a child's whole environment; more than its fraction of a GPU raises `torch.OutOfMemoryError`."""
    variables = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "TMPDIR": str(home),
        "LANG": "C.UTF-8",
        "USER": "job",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    if not walled or not gpus:  # behind the wall the other cards are not there to be counted
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    if gpus:
        # Some torch releases heed only the old name: https://github.com/pytorch/pytorch/issues/183387
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            variables[name] = f"per_process_memory_fraction:{gpu_memory_fraction:.4f}"
    return variables | {name: os.environ[name] for name in PASSED_ON if name in os.environ}
