"""The main loop's pulse: whether it still turns, as other threads and systemd see it."""

from __future__ import annotations

import time


class Tick:
    """When the main loop last came round; safe for several threads, and no look waits for a lock."""

    def __init__(self) -> None:
        self._beaten_s = time.monotonic()

    def beat(self) -> None:
        """Note that the main loop has come round: it alone calls this."""
        self._beaten_s = time.monotonic()

    def age_s(self) -> float:
        """Return how long ago that was, in seconds: about one, and more only when something holds it up."""
        return time.monotonic() - self._beaten_s
