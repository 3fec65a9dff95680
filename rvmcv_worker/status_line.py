"""How the worker is, in one line: what `systemctl status` shows."""

from __future__ import annotations

from rvmcv_worker.logs import escape
from rvmcv_worker.protocol import DesiredState
from rvmcv_worker.state import Condition

#: Jobs that are named; of more only the number.
_NAMED = 2
#: Longest line, in characters.
_LONGEST = 300
_WISHED = {DesiredState.PAUSE: "paused", DesiredState.DRAIN: "drained"}


def status_line(condition: Condition, server_url: str) -> str:
    """Return what runs, then the wish or the fault that keeps the worker from claiming more."""
    running = condition.running()
    jobs = ", ".join(job.job_id for job in running[:_NAMED])
    more = f" and {len(running) - _NAMED} more" if len(running) > _NAMED else ""
    parts = [f"runs {jobs}{more}"] if running else []
    wish = condition.wishes().holds
    faults = condition.faults()
    if condition.stopping.is_set():
        parts.append("stops")
    elif faults:
        others = f" (and {len(faults) - 1} more: rvmcv-worker status)" if len(faults) > 1 else ""
        parts.append(f"degraded: {faults[0]}{others}")
    elif wish in _WISHED:
        parts.append(f"{_WISHED[wish]}: nothing is claimed")
    elif not running:
        parts.append(f"waits for jobs of {server_url}")
    line = escape(" ".join("; ".join(parts).split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
