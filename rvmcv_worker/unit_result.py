"""How systemd saw a service end, in words."""

from __future__ import annotations

import os
import signal
import subprocess

from rvmcv_worker.exit_codes import ExitCode

#: What systemd's Result= means for the worker.
_RESULTS = {
    "watchdog": "its main loop hung, and systemd ended it",
    "timeout": "it did not start, or not stop, in its time",
    "oom-kill": "the machine had no memory left",
    "start-limit-hit": "it was started again and again within ten minutes",
    "protocol": "it ended before it was ready",
    "resources": "systemd could not start it",
}
_MEANINGS = {
    ExitCode.FAILED: "a fault, its log has it",
    ExitCode.ALREADY_RUNNING: "another process works on its state directory",
    ExitCode.CONFIG: "its configuration or its token cannot be used",
}
_PATIENCE_S = 10.0


def is_active(unit: str) -> bool:
    """Whether the unit runs or is being started; False where systemd does not say."""
    return _show(unit).get("ActiveState") in {"active", "activating", "reloading"}


def why_failed(unit: str) -> str:
    """Return how the unit ended last."""
    found = _show(unit)
    result = found.get("Result", "") or os.environ.get("MONITOR_SERVICE_RESULT", "")
    words = [_RESULTS[result]] if result in _RESULTS else []
    if ended := _ended(found):
        words.append(ended)
    return "; ".join(words) or "how it ended systemd does not say"


def _ended(found: dict[str, str]) -> str:
    """Return how its main process ended: ExecMainCode= is a CLD_ number of waitid(2)."""
    code, status = found.get("ExecMainCode"), found.get("ExecMainStatus", "")
    if not status.isdecimal():
        return ""
    if code == str(os.CLD_EXITED):
        meaning = _MEANINGS.get(ExitCode(int(status))) if int(status) in set(ExitCode) else None
        return f"it ended with status {status}{f' ({meaning})' if meaning else ''}"
    if code in {str(os.CLD_KILLED), str(os.CLD_DUMPED)}:
        known = int(status) in set(signal.Signals)  # most real-time signals have no name
        return f"signal {signal.Signals(int(status)).name if known else status} ended it"
    return ""


def _show(unit: str) -> dict[str, str]:
    names = "ActiveState,Result,ExecMainCode,ExecMainStatus"
    try:
        shown = subprocess.run(
            ["systemctl", "show", f"--property={names}", "--", unit],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
