"""When the main loop ticked last: what shows from outside whether it hangs."""

from __future__ import annotations

import time


class Tick:
    """Beaten by the main loop, read by any thread."""

    def __init__(self) -> None:
        self._at_s = time.monotonic()

    def beat(self) -> None:
        """The main loop is alive."""
        self._at_s = time.monotonic()

    def age_s(self) -> float:
        """How long ago that was, in seconds."""
        return time.monotonic() - self._at_s
