"""Run a program as an ordinary user even where the tests run as root, which no process limit holds."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

#: Nobody has this number, so that no other process counts against its limits.
UID = 61234
_ROOT = Path(__file__).parents[1]


def command(argv: list[str]) -> list[str]:
    """Return the command line that runs `argv` as an ordinary user, which whoever is one already does."""
    return argv if os.getuid() else private(argv, uid=UID)


def private(argv: list[str], *, uid: int = 0) -> list[str]:
    """Return root's command line that runs `argv` as `uid` with mounts of its own.

    There the interpreter and this tree can be seen by anybody, even where root keeps them at home.
    """
    lines = ["set -e", "hold=$(mktemp -d)"]
    needed = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), _ROOT.resolve()}
    closed = {shut for path in needed if (shut := _closed_above(path))}
    for top in sorted(closed):
        inside = sorted(path for path in needed if path.is_relative_to(top))
        for number, path in enumerate(inside):
            lines += [f"mkdir $hold/{number}", f"mount --bind {shlex.quote(str(path))} $hold/{number}"]
        lines.append(f"mount -t tmpfs -o mode=755 none {shlex.quote(str(top))}")
        for number, path in enumerate(inside):
            lines += [f"mkdir -p {shlex.quote(str(path))}"]
            lines += [f"mount --bind $hold/{number} {shlex.quote(str(path))}", f"umount $hold/{number}"]
            lines += [f"rmdir $hold/{number}"]
    lines.append("rmdir $hold")
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
    lines.append(f"exec {shlex.join([*user, *argv])}")
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(lines)]


def is_possible() -> bool:
    """Whether this machine lets the tests become an ordinary user, if they are not."""
    return bool(os.getuid() or (shutil.which("unshare") and shutil.which("setpriv")))


def _closed_above(path: Path) -> Path | None:
    """Return the first directory on the way to `path` that others may not enter."""
    for above in reversed(path.parents):
        if not above.stat().st_mode & 0o001:
            return above
    return None
