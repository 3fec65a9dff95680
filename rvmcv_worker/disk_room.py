"""What the disk has and the worker holds of it, as last looked at: whoever asks waits for no disk."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

#: With an older look at it than this, in seconds, the disk itself hangs.
SILENT_S = 10.0


@dataclass(frozen=True)
class DiskLook:
    """One look, in bytes."""

    free_bytes: int | None = None
    workspace_bytes: int | None = None
    model_store_bytes: int | None = None
    looked_s: float = field(default_factory=time.monotonic)

    @property
    def age_s(self) -> float:
        """How long ago it was, in seconds: where the disk hangs, longer and longer."""
        return time.monotonic() - self.looked_s


class DiskRoom:
    """Holds the last look; one thread notes, all may read."""

    def __init__(self) -> None:
        self.last = DiskLook()

    def note(self, look: DiskLook) -> None:
        """Put a newer look in the place of the last."""
        self.last = look
