"""Where events go: into the journal where systemd started the worker, else to standard error.

One line an event, for people or in JSON. What the journal itself does not take goes to standard error, which
systemd brings there too, each line with its priority as a ``<n>`` prefix: nothing is lost.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from loguru import logger

from rvmcv_worker import journal, log_line
from rvmcv_worker.events import Event, event
from rvmcv_worker.repeats import Repeats

if TYPE_CHECKING:
    from loguru import Message, Record

LogFormat = Literal["text", "json"]
#: How long the end of the process waits for another thread's writing, in seconds.
_CLOSE_S = 1.0


class LogOutput:
    """Writes one event after the other."""

    def __init__(self, log_format: LogFormat) -> None:
        self._json = log_format == "json"
        self._to_journal = journal.has_stderr()
        self._journal = journal.Journal()
        self._repeats = Repeats()
        self._lock = threading.Lock()

    def write(self, message: Message) -> None:
        """Write an event, unless there were many like it."""
        record, now_s = message.record, time.monotonic()
        with self._lock:
            self._write_all(self._repeats.summaries(now_s))
            if not self._repeats.holds_back(record, now_s):
                self._write_all([record])

    def tell_held_back(self) -> None:
        """Tell what was held back in minutes that are over: on a quiet worker the next event may be far."""
        with self._lock:
            self._write_all(self._repeats.summaries(time.monotonic()))

    def close(self) -> None:
        """Tell what was held back, unless a thread hangs in its writing: that must not keep the process."""
        if self._lock.acquire(timeout=_CLOSE_S):
            self._write_all(self._repeats.summaries(time.monotonic(), all_of_them=True))
            self._journal.close()
            self._lock.release()

    def _write_all(self, records: list[Record]) -> None:
        for record in records:
            lines = [log_line.as_json(record)] if self._json else [log_line.text(record), *_trace(record)]
            if self._to_journal:
                if self._journal.send(log_line.fields(record, "\n".join(lines))):
                    continue
                # On each line: journald would take a priority that a later line begins with.
                lines = [f"<{log_line.priority(record)}>{line}" for line in lines]
            elif not self._json:
                stamp = record["time"].strftime("%Y-%m-%d %H:%M:%S")
                lines[0] = f"{stamp} {record['level'].name:<7} {lines[0]}"
            sys.stderr.write("\n".join(lines) + "\n")
            sys.stderr.flush()


def _trace(record: Record) -> list[str]:
    return [f"  {line}" for line in log_line.trace(record)]


def log_uncaught(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """Log what ended the process; Python's own way would print it as it is (see `sys.excepthook`)."""
    event(Event.WORKER_DIED).opt(exception=error).critical(
        "the worker ends of a fault of its own: please report it with these lines; systemd starts it anew"
    )


class _ToLoguru(logging.Handler):
    """Carries what libraries log by `logging` over to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        # A library may have levels of its own, which loguru knows by their numbers alone.
        level = record.levelname if record.levelname in log_line.LEVELS else record.levelno
        event(Event.LIBRARY_WARNED).opt(depth=6).log(level, "{}: {}", record.name, record.getMessage())


def configure(level: str, log_format: LogFormat = "text") -> LogOutput:
    """Set the output up and return it; called once, before anything is logged."""
    output = LogOutput(log_format)
    logger.remove()
    logger.add(output.write, level=level, diagnose=False, backtrace=False, format="{message}")
    atexit.register(output.close)
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    # What it warns of comes as an exception too; its text holds pieces of answers, lease tokens among them.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    return output
