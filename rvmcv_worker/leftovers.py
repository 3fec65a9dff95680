"""Wipes what a worker that does not run left on the disk: after a power cut, or when it is to stay off."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from rvmcv_worker import kept_claims, owner, state_lock, workspace
from rvmcv_worker.config import Settings
from rvmcv_worker.ledger import ClaimRow, Ledger
from rvmcv_worker.process_tree import kill_marked
from rvmcv_worker.recovery import workspace_name
from rvmcv_worker.socket_file import FILE_NAME, PART_NAME, answers

#: How long the machine is up, in seconds, before the files of a claim go that no daemon comes for.
KEPT_S = 7 * 24 * 3600.0


def wipe(settings: Settings, *, store: bool) -> Iterator[str]:
    """Wipe all that no daemon needs any more, with `store` the models too; yields in sentences what was done.

    Directories that claims name are kept: the next start brings their checkpoints to storage. After `KEPT_S`
    they go; the claims stay, and their jobs are handed back without. Raises `AlreadyRunningError` where a
    daemon runs, `ConfigError`, `LedgerUnavailableError`, `InternalError`, and `OSError` for what cannot be
    removed.
    """
    state_dir = settings.worker.state_dir
    if not state_dir.is_dir():
        return
    owner.become(state_dir)
    lock = state_lock.take(state_dir)
    try:
        if killed := kill_marked(f"{settings.work_dir}/"):
            yield f"ended {killed} processes that a worker had left behind"
        keep: set[str] = set()
        for row, kept_s in _claims(state_dir):
            if kept_s < KEPT_S:
                keep.add(workspace_name(row))
            elif (settings.work_dir / workspace_name(row)).exists():
                yield (
                    f"{row.job_id}: no worker has come for its checkpoint in {kept_s / 86400:.0f} days;"
                    " its files go, and the job goes on from an earlier one, or anew"
                )
        for name in workspace.sweep(settings.work_dir, keep=keep):
            yield f"wiped what was left of {name}"
        yield from (f"kept for the worker's next start: {name}" for name in sorted(keep))
        yield from _wipe_models(settings.model_store_dir, everything=store)
        yield from _remove_sockets(settings.worker.runtime_dir)
    finally:
        os.close(lock)


def _claims(state_dir: Path) -> list[tuple[ClaimRow, float]]:
    """Return each claim, and how long its files have been kept for it, in seconds."""
    file = state_dir / "ledger.sqlite3"
    if not file.exists():
        return []
    ledger = Ledger(file)
    try:
        rows = ledger.claims()
    finally:
        ledger.close()
    kept_s = kept_claims.count(state_dir, [row.claim_id for row in rows])
    return [(row, kept_s[row.claim_id]) for row in rows]


def _wipe_models(directory: Path, *, everything: bool) -> Iterator[str]:
    """Wipe downloads that were cut off, or the whole store."""
    if everything:
        if names := workspace.sweep(directory, keep=set()):
            yield f"emptied the model store of {len(names)} files and directories"
        return
    for part in directory.glob(".part-*"):
        workspace.wipe(part)
        yield f"wiped an unfinished download: {part.name}"


def _remove_sockets(directory: Path) -> Iterator[str]:
    """Remove a dead daemon's socket; one with another state directory may live beside it."""
    for file in (directory / FILE_NAME, directory / PART_NAME):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if stat.S_ISSOCK(file.lstat().st_mode) and not answers(file):
                file.unlink()
                yield f"removed a socket that nobody answers on: {file}"
