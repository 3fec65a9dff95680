"""How long the files of each claim wait for a daemon that does not come, by a clock that cannot jump.

The wall clock of a machine that lost its power may say anything. Counted is how long the machine was up: days
in which it was off do not count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

FILE_NAME = "kept-claims.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def count(state_dir: Path, claim_ids: Collection[str]) -> dict[str, float]:
    """Return for each claim how many seconds the machine has been up since the first count that had it.

    The count is written down for the next one, without the claims that are not asked about any more.
    """
    file = state_dir / FILE_NAME
    boot_id, up_s = _BOOT_ID.read_text().strip(), time.clock_gettime(time.CLOCK_BOOTTIME)
    before = _read(file)
    passed_s = up_s - before["up_s"] if before["boot_id"] == boot_id else up_s
    kept_s = {
        claim_id: before["kept_s"][claim_id] + passed_s if claim_id in before["kept_s"] else 0.0
        for claim_id in claim_ids
    }
    if kept_s:
        part = file.with_name(f"{FILE_NAME}.part")
        part.write_text(json.dumps({"boot_id": boot_id, "up_s": up_s, "kept_s": kept_s}))
        part.replace(file)
    else:
        file.unlink(missing_ok=True)
    return kept_s


def _read(file: Path) -> dict[str, Any]:
    """Return the last count; one that cannot be read is none, and the claims are kept for longer."""
    try:
        found = json.loads(file.read_text())
        return {
            "boot_id": str(found["boot_id"]),
            "up_s": float(found["up_s"]),
            "kept_s": {str(claim_id): float(seconds) for claim_id, seconds in found["kept_s"].items()},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"boot_id": "", "up_s": 0.0, "kept_s": {}}
