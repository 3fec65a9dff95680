"""What a child without a wall starts as: takes rights from itself, then turns into the child.

Started as ``python -m rvmcv_worker.confine FD PROGRAM ARGUMENT…``; from the descriptor it reads what it may
still do, as `plan` wrote it. It decides nothing itself, and where a step fails there is no child.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from rvmcv_worker import kernel, landlock
from rvmcv_worker.landlock import Ruleset

#: The exit status where the child could not be confined.
FAILED = 71  # EX_OSERR


def plan(filter_program: bytes | None, ruleset: Ruleset | None) -> bytes:
    """Return what is to be done, of what there is on this machine."""
    return json.dumps(
        {
            "filter": filter_program.hex() if filter_program is not None else None,
            "ruleset": asdict(ruleset) if ruleset is not None else None,
        }
    ).encode()


def main() -> None:
    """Confine this process and run the program."""
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        wanted = json.load(file)
    try:
        kernel.forbid_new_privileges()
        if wanted["ruleset"] is not None:
            landlock.restrict(Ruleset.parse(wanted["ruleset"]))
        if wanted["filter"] is not None:
            kernel.filter_calls(bytes.fromhex(wanted["filter"]))
        os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - as the daemon wrote it
    except OSError as error:
        sys.stderr.write(f"the child could not be confined: {error}\n")
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
