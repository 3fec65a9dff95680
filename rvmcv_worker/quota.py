"""What a running child may take of disk, memory and processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

from rvmcv_worker import launch
from rvmcv_worker.config import LimitSettings
from rvmcv_worker.errors import DiskQuotaError, JobCrashedError, OutOfMemoryError, WorkerUnfitError
from rvmcv_worker.process_tree import ProcessTree
from rvmcv_worker.workspace import Usage, Workspace, measure, walk

#: How long one `check` counts files at most, in seconds: normally, and when the job may be over its quota.
_SLICE_S, _HASTE_S = 0.02, 0.25
_GB = 1e9


class DiskQuota:
    """Watches what a workspace takes in which one child writes, and what the disk has left.

    What the file system has left is one call, made at every check. The files are counted by walking:
    a slice at a time, so that a child with a million of them does not keep the daemon from listening to
    it. Up to some 5,000 files that is a whole count a check. Between two counts the job cannot have
    taken more than the file system lost; once that is half of what the job has left, slices are longer.
    """

    def __init__(self, workspace: Workspace, child_name: str, limits: LimitSettings) -> None:
        self._directory = workspace.child_dir(child_name)
        self._limit = Usage(int(limits.max_workspace_gb * _GB), 2 * limits.max_archive_entries)
        self._floor = Usage(int(limits.disk_floor_gb * _GB), limits.disk_floor_files)
        self._rest = Usage(0, 0)
        for entry in workspace.root.iterdir():
            if entry.is_dir() and entry != self._directory:
                self._rest += measure(entry)
        self._used = self._unlinked = Usage(0, 0)
        self._walk: Iterator[Usage] | None = None
        self._found = Usage(0, 0)
        self._free_at_walk = self._free_at_count = self._free()
        self._free_at_start = self._free_at_count + self._rest

    def check(self, tree: ProcessTree | None = None) -> None:
        """Count on, for a moment; raises when the job is over its quota or the disk is nearly full.

        That is `DiskQuotaError` where the job itself holds what is missing, else `WorkerUnfitError`. Of
        `tree`, files count too that it has removed and holds open: no walk would find them.
        """
        if tree is not None:
            if (pid := tree.hiding()) is not None:
                raise DiskQuotaError(
                    f"what the job holds open cannot be measured: process {pid} hides its open files"
                )
            self._unlinked = Usage(tree.unlinked_bytes(self._directory.stat().st_dev), 0)
        free = self._free()
        if self._under_floor(free):
            self.check_whole()
        left_bytes, left_files = self._left()
        hasty = (
            self._free_at_count.bytes - free.bytes > left_bytes // 2
            or self._free_at_count.files - free.files > left_files // 2
        )
        if self._walk is None:
            self._walk, self._found, self._free_at_walk = walk(self._directory), Usage(0, 0), free
        end_s = time.monotonic() + (_HASTE_S if hasty else _SLICE_S)
        for found in self._walk:
            self._found = found
            if self._is_over(found):
                self._walk = None
                self.check_whole()  # what moved while the slices were taken may have been counted twice
                return
            if time.monotonic() >= end_s:
                return
        self._used, self._walk, self._free_at_count = self._found, None, self._free_at_walk

    def check_whole(self) -> None:
        """Count every file now, in one go, and raise as `check` does."""
        free = self._free()
        for found in walk(self._directory):
            if self._is_over(found):
                raise self._over(found)
        self._used, self._free_at_count = found, free
        if self._under_floor(free):
            raise self._nearly_full(free)

    def _free(self) -> Usage:
        found = os.statvfs(self._directory)
        files = found.f_favail if found.f_files else sys.maxsize  # btrfs makes inodes as it needs them
        return Usage(found.f_bavail * found.f_frsize, files)

    def _under_floor(self, free: Usage) -> bool:
        return free.bytes < self._floor.bytes or free.files < self._floor.files

    def _left(self) -> tuple[int, int]:
        taken = self._rest + self._unlinked + self._used
        return self._limit.bytes - taken.bytes, self._limit.files - taken.files

    def _is_over(self, used: Usage) -> bool:
        taken = self._rest + self._unlinked + used
        return taken.bytes >= self._limit.bytes or taken.files > self._limit.files

    def _over(self, used: Usage) -> DiskQuotaError:
        taken = self._rest + self._unlinked + used
        if taken.files > self._limit.files:
            return DiskQuotaError(
                f"the job has more than the {self._limit.files} files that it may have "
                "(twice limits.max_archive_entries)"
            )
        return DiskQuotaError(
            f"the job's files take {taken.bytes / _GB:.3g} GB, over the limit of "
            f"{self._limit.bytes / _GB:g} GB (limits.max_workspace_gb)"
        )

    def _nearly_full(self, free: Usage) -> DiskQuotaError | WorkerUnfitError:
        """Say who filled the disk: the job, when it holds most of what went and more than the floor."""
        held = self._rest + self._unlinked + self._used
        if free.bytes < self._floor.bytes:
            lost, mine, floor = self._free_at_start.bytes - free.bytes, held.bytes, self._floor.bytes
            what = (
                f"the disk has {free.bytes / _GB:.3g} GB left while the job runs, under the floor of "
                f"{floor / _GB:g} GB (limits.disk_floor_gb); the job itself holds {mine / _GB:.3g} GB"
            )
        else:
            lost, mine, floor = self._free_at_start.files - free.files, held.files, self._floor.files
            what = (
                f"the disk has room for {free.files} files while the job runs, under the floor of {floor} "
                f"(limits.disk_floor_files); the job itself has {mine}"
            )
        if mine > floor and 2 * mine > lost:
            return DiskQuotaError(what)
        return WorkerUnfitError(f"{what}: it goes back to the queue")


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


def check_processes(tree: ProcessTree) -> None:
    """Raise `JobCrashedError` when the tree has too many processes and threads.

    The kernel's own limit does not hold root, and one user's children share it: who comes near it is ended
    before the others have none left.
    """
    limit = launch.MAX_PROCESSES * 3 // 4
    if tree.exceeds(limit):
        raise JobCrashedError(f"the job has more than {limit} processes and threads: use fewer workers")
