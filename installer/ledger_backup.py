"""Copies the worker's ledger before an upgrade, by SQLite's own backup; run as the worker's user."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import time
from pathlib import Path

#: How many copies are kept.
KEPT = 5


def main(state_dir: Path, release: str) -> int:
    """Copy ``ledger.sqlite3`` to ``backup/ledger-<release>-<time>.sqlite3``; nothing to do where none is."""
    os.umask(0o077)  # lease tokens lie in it
    ledger = state_dir / "ledger.sqlite3"
    if not ledger.exists():
        return 0
    directory = state_dir / "backup"
    directory.mkdir(exist_ok=True)
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    file = directory / f"ledger-{release}-{moment}.sqlite3"
    try:
        part = file.with_suffix(".part")
        part.unlink(missing_ok=True)
        with (
            contextlib.closing(sqlite3.connect(ledger)) as source,
            contextlib.closing(sqlite3.connect(part)) as copy,
        ):
            source.backup(copy)
        part.replace(file)
    except (sqlite3.Error, OSError) as error:
        print(f"{ledger} cannot be copied to {file}: {error}", file=sys.stderr)
        return 1
    copies = sorted(directory.glob("ledger-*.sqlite3"), key=lambda each: each.stat().st_mtime)
    for old in copies[:-KEPT]:
        old.unlink()
    print(f"the ledger is kept as {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
