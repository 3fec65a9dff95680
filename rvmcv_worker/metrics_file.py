"""The metrics as a file, for node_exporter's textfile collector: Prometheus without a port of ours."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from rvmcv_worker.events import Event, event
from rvmcv_worker.partial_file import new_file

#: Seconds between two writings, however waiting times are scaled: who reads it scrapes no more often.
EVERY_S = 15.0
#: A stop waits so long for a disk that hangs under a writing.
_CLOSE_S = 2.0


class MetricsFile(threading.Thread):
    """One thread for the daemon's life; whoever reads the file finds the last one whole, or none."""

    def __init__(self, file: Path, text: Callable[[], bytes], every_s: float = EVERY_S) -> None:
        super().__init__(name="metrics-file", daemon=True)
        self._file = file
        self._text = text
        self._every_s = every_s
        self._missed = False
        self._closing = threading.Event()

    def run(self) -> None:
        """Write at once, and then at the interval; what cannot be written is tried again."""
        while not self._closing.is_set():
            try:
                self._write()
            except OSError as error:
                self._tell_missed(error)
            except Exception:  # noqa: BLE001 - no figure is worth a worker
                event(Event.WORKER_FAULT).exception(
                    "a fault of the worker's own in its metrics: they are tried again"
                )
            self._closing.wait(self._every_s)

    def close(self) -> None:
        """Write no more, and take the file away: its figures would be read as those of a living worker."""
        self._closing.set()
        if self.is_alive():
            self.join(_CLOSE_S)
        if not self.is_alive():  # else its disk hangs, and would hold up the stop too
            with contextlib.suppress(OSError):
                self._file.unlink()

    def _write(self) -> None:
        text = self._text()
        part = self._file.with_name(f".{self._file.name}.part")  # not *.prom: node_exporter passes it over
        part.unlink(missing_ok=True)
        with new_file(part) as opened:
            os.fchmod(opened.fileno(), 0o644)
            opened.write(text)
        part.replace(self._file)
        if self._missed:
            self._missed = False
            event(Event.METRICS_WRITTEN).info("{} is written again", self._file)

    def _tell_missed(self, error: OSError) -> None:
        if not self._missed:
            self._missed = True
            event(Event.METRICS_UNWRITTEN).warning(
                "[worker] metrics_file: {} cannot be written: {}; let the worker's user write into its"
                " directory, and list that in the unit's ReadWritePaths=. Jobs go on; it is tried again",
                self._file,
                error.strerror,
            )
