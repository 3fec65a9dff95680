"""The hostile job: a child's program of its own, which needs nothing but Python.

It reads `NAME/job.json` as every child does, makes each attempt in a process of its own, and answers with
what each has reached. A way out that is refused raises or returns nothing. `job["targets"]` says where what
is worth stealing lies: an attacker who has to guess would be a weaker one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

from tests.attacks import files, kernel, means, network, processes, secrets
from tests.attacks.attack import ATTACKS, Attack

__all__ = ["ATTACKS", "files", "kernel", "main", "means", "network", "processes", "secrets"]

#: How long one attempt may take.
_ATTEMPT_S = 10


def _attempt(tried: Attack, targets: dict[str, Any]) -> dict[str, str]:
    """Make one attempt in a process of its own; returns what it `reached`, or by what it was `refused`."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(_ATTEMPT_S)
        os.close(read_fd)
        try:
            reached = tried.run({**targets, "answer_fd": write_fd})
            answer = {"reached": reached} if reached else {"refused": "nothing there"}
        except (OSError, ValueError) as error:
            answer = {"refused": str(error)}
        except BaseException as error:  # noqa: BLE001 - a bug of the attack is not a defence
            answer = {"broken": f"{type(error).__name__}: {error}"}
        os.write(write_fd, json.dumps(answer).encode()[:60_000])
        os._exit(0)
    os.close(write_fd)
    poll = select.poll()
    poll.register(read_fd, select.POLLIN)
    poll.poll((_ATTEMPT_S + 1) * 1000)
    data = os.read(read_fd, 65536)
    os.close(read_fd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if data:
        found: dict[str, str] = json.loads(data)
        return found
    # Killed for what it called is a refusal; that nobody stopped it in time is none.
    refused = status < 0 and status != -signal.SIGALRM
    return {"refused" if refused else "broken": f"ended with status {status}"}


def main() -> None:
    """Make every attempt that `job.json` does not leave out."""
    directory = Path(sys.argv[1])
    job = json.loads((directory / "job.json").read_text())
    targets = {**job["targets"], "own": str(directory.resolve()), "progress_fd": job["progress_fd"]}
    only = job.get("only")
    found = {}
    for tried in ATTACKS:
        if tried.name in only if only else tried.tried_as(targets["user"]) and not tried.alone:
            found[tried.name] = _attempt(tried, targets)
    (directory / "result.json").write_text(json.dumps({"ok": True, "result": found}))
