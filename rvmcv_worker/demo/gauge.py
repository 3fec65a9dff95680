"""What is seen of the daemon from outside while it works."""

from __future__ import annotations

import re
from pathlib import Path

import psutil


class Gauge:
    """Samples one process; its children are not its own memory, nor its sockets."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._peak_kb = 0
        self._most_listening = 0
        self._cpu_s = 0.0

    def sample(self) -> None:
        """Look once; a process that has ended is left as it was last seen."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            times = self._process.cpu_times()
            connections = self._process.net_connections("inet")
        except (OSError, psutil.Error):
            return
        # The kernel's own peak, so that none is missed between two samples.
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            self._peak_kb = max(self._peak_kb, int(found.group(1)))
        self._cpu_s = times.user + times.system
        listening = [c for c in connections if c.status == psutil.CONN_LISTEN or not c.raddr]
        self._most_listening = max(self._most_listening, len(listening))

    @property
    def peak_rss_mb(self) -> float:
        """Most resident memory so far, in MB of 2**20 bytes."""
        return round(self._peak_kb / 1024, 1)

    @property
    def listening_sockets(self) -> int:
        """Most sockets at once that a stranger could send to: TCP that listens, UDP without a peer."""
        return self._most_listening

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU time so far."""
        return round(self._cpu_s, 2)
