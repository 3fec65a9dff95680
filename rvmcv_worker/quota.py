"""What a running child may take of disk and memory."""

from __future__ import annotations

import os
import time

from rvmcv_worker.config import LimitSettings
from rvmcv_worker.errors import DiskQuotaError, OutOfMemoryError
from rvmcv_worker.process_tree import ProcessTree
from rvmcv_worker.workspace import Usage, Workspace, measure

#: A child's directory is walked at most this share of the time.
_WALK_SHARE = 0.002
_GB = 1e9


class DiskQuota:
    """Watches the size of a workspace in which one child writes, and the disk's own floor.

    A walk through a large directory costs more than a look at the file system: the walk is repeated
    when it is cheap, and at once when the file system has lost as much as the job has left.
    """

    def __init__(self, workspace: Workspace, child_name: str, limits: LimitSettings) -> None:
        self._directory = workspace.child_dir(child_name)
        self._limit_bytes = int(limits.max_workspace_gb * _GB)
        self._floor_bytes = int(limits.disk_floor_gb * _GB)
        self._max_files = 2 * limits.max_archive_entries
        self._rest = Usage(0, 0)
        for entry in workspace.root.iterdir():
            if entry.is_dir() and entry != self._directory:
                self._rest += measure(entry)
        self._used = Usage(0, 0)
        self._free_at_walk = (0, 0)
        self._next_walk_s = 0.0

    def check(self, *, walk: bool = False) -> None:
        """Raise `DiskQuotaError` when the job is over its quota or the disk is nearly full.

        `walk` looks at every file now, whatever it costs.
        """
        free_bytes, free_files = self._free()
        if free_bytes < self._floor_bytes:
            raise DiskQuotaError(
                f"the disk has {free_bytes / _GB:.1f} GB left while the job runs, under the floor of "
                f"{self._floor_bytes / _GB:g} GB (limits.disk_floor_gb); the job itself holds "
                f"{(self._rest + self._used).bytes / _GB:.1f} GB"
            )
        now_s = time.monotonic()
        left = self._limit_bytes - (self._rest + self._used).bytes
        lost_bytes, lost_files = self._free_at_walk[0] - free_bytes, self._free_at_walk[1] - free_files
        walk = walk or now_s >= self._next_walk_s
        if not walk and lost_bytes < left // 2 and lost_files < self._max_files // 2:
            return
        self._used = measure(self._directory)
        self._free_at_walk = (free_bytes, free_files)
        self._next_walk_s = now_s + (time.monotonic() - now_s) / _WALK_SHARE
        used = self._rest + self._used
        if used.bytes >= self._limit_bytes:
            raise DiskQuotaError(
                f"the job's files take {used.bytes / _GB:.3g} GB, over the limit of "
                f"{self._limit_bytes / _GB:g} GB (limits.max_workspace_gb)"
            )
        if used.files > self._max_files:
            raise DiskQuotaError(
                f"the job has {used.files} files, over the limit of {self._max_files} "
                "(twice limits.max_archive_entries)"
            )

    def _free(self) -> tuple[int, int]:
        found = os.statvfs(self._directory)
        return found.f_bavail * found.f_frsize, found.f_favail


class MemoryLimit:
    """Watches the memory of a tree of processes and notes its peak and its CPU time."""

    def __init__(self, tree: ProcessTree, limits: LimitSettings) -> None:
        self._tree = tree
        self._limit_bytes = int(limits.max_job_memory_gb * _GB)
        self.peak_bytes = 0
        self.cpu_s = 0.0

    def check(self) -> None:
        """Raise `OutOfMemoryError` when the tree is over its limit."""
        sample = self._tree.sample()
        used = sample.memory_bytes
        if used > self._limit_bytes:
            used = self._tree.exact_memory_bytes()  # workers that share pages may look larger than they are
        self.peak_bytes = max(self.peak_bytes, used)
        self.cpu_s = max(self.cpu_s, sample.cpu_s)
        if used > self._limit_bytes:
            raise OutOfMemoryError(
                f"the job holds {used / _GB:.3g} GB of memory of at most {self._limit_bytes / _GB:g} GB "
                "(limits.max_job_memory_gb): use a smaller batch, fewer workers, or no cache"
            )
