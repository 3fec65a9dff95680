"""Progress reports: the newest state wins, and every epoch is kept."""

from __future__ import annotations

from typing import Any

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.leases import hold
from rvmcv_worker.reference.states import JobStatus
from rvmcv_worker.reference.turn import Turn


def take_progress(turn: Turn, report: wire.ProgressReport) -> wire.Directive:
    """Renew the lease, store what is new, and tell whether to go on."""
    job, attempt = hold(turn, report.job_id, report.lease_token)
    if report.seq > attempt.last_seq:
        attempt.last_seq = report.seq
        state = report.progress.model_dump(mode="json", exclude_none=True, exclude={"history"})
        job.progress = {**state, "attempt": attempt.attempt}
        if report.progress.history:
            job.history = merge_history(job.history, report.progress.history)
        if report.progress.checkpoint is not None:
            job.checkpoint = report.progress.checkpoint.model_dump(exclude_none=True)
    return wire.Directive(directive="cancel" if job.status == JobStatus.CANCELLING.value else "continue")


def merge_history(stored: list[Any], new: list[dict[str, Any]]) -> list[Any]:
    """Append new epochs; one that is reported again (by a later attempt) replaces its old entry.

    An attempt that starts over or resumes also takes back the old epochs after its own.
    """
    epochs = [entry["epoch"] for entry in new if isinstance(entry.get("epoch"), int)]
    if epochs:
        stored = [entry for entry in stored if entry.get("epoch", -1) < min(epochs)]
    return [*stored, *new]
