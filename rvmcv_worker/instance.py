"""The instance_id under which RVM-Server last heard of this worker: what outlives the daemon that had it."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

FILE_NAME = "instance-id"


def note(state_dir: Path, instance_id: str) -> None:
    """Write down that RVM-Server hears of this instance from now on.

    On a disk that takes nothing the one before stands there, which RVM-Server then calls superseded.
    """
    file = state_dir / FILE_NAME
    part = file.with_name(f"{FILE_NAME}.part")
    with contextlib.suppress(OSError):
        part.write_text(f"{instance_id}\n")
        part.replace(file)


def last(state_dir: Path) -> str | None:
    """Return what was noted last; None where nothing was, or it cannot be read."""
    try:
        return str(uuid.UUID((state_dir / FILE_NAME).read_text().strip()))
    except (OSError, ValueError):
        return None
