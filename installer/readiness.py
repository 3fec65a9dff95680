"""Whether a worker is as well as the one before it was: what an upgrade is held to.

A worker that was well before must be well. Of one that was degraded before, as by a server that cannot be
reached, no more is asked than that it has no fault that was not there before: that is not the new release's.
Where none ran before, it is enough that this one answers.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

#: `WorkerState` but for ``degraded``.
WELL = {"ready", "busy", "paused", "draining"}
#: What is another in each telling of the same fault: figures, and where objects lay in memory.
_CHANGING = re.compile(r"0x[0-9a-f]+|[0-9]+")


def in_the_way(before: dict[str, Any], now: dict[str, Any], version: str) -> str | None:
    """Return why the worker that says `now` is not ready; None when it is.

    Both are what ``status --json`` says; `before` is empty where no worker ran.
    """
    if now.get("version") != version:
        return f"version {now.get('version')} answers, and {version} was started"
    if now["state"] in WELL or not before:
        return None
    excused = before["reasons"] if before["state"] not in WELL else []
    known = {_CHANGING.sub("#", reason) for reason in excused}
    fresh = [reason for reason in now["reasons"] if _CHANGING.sub("#", reason) not in known]
    return f"it is {now['state']}: {'; '.join(fresh)}" if fresh else None


def main(before_file: Path, version: str) -> int:
    """Read the status of now from stdin; print what is in the way."""
    text = sys.stdin.read()
    try:
        now = json.loads(text)
    except ValueError:
        now = None
    if not isinstance(now, dict):
        print(f"it does not answer: {text.strip()[-300:]}")
        return 1
    reason = in_the_way(json.loads(before_file.read_text()), now, version)
    print(reason or "")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
