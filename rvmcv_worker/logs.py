"""One line an event, on standard error; secrets masked, text from outside escaped.

Under systemd each line carries its journald priority as a ``<n>`` prefix and no time of its own.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Message, Record

_PRIORITY = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "SUCCESS": 5, "INFO": 6, "DEBUG": 7, "TRACE": 7}
#: A query may hold a signature: URLs in messages end before it.
_QUERY = re.compile(r"(\bhttps?://[^\s?\"'<>]+)\?[^\s\"'<>]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_secrets: set[str] = set()
_secrets_lock = threading.Lock()


def mask(*secrets: str) -> None:
    """Never print these strings again."""
    with _secrets_lock:
        _secrets.update(secret for secret in secrets if len(secret) >= 4)


def redact(text: str) -> str:
    """Return `text` without secrets and without the queries of URLs."""
    with _secrets_lock:
        known = tuple(_secrets)
    for secret in known:
        text = text.replace(secret, "********")
    return _QUERY.sub(r"\1?…", text)


def escape(text: str) -> str:
    """Return text from outside as one line that no terminal, journal or page can be misled by."""
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def _line(record: Record) -> str:
    text = record["message"]
    if job_id := record["extra"].get("job_id"):
        text = f"[{job_id[:128]}] {text}"  # the id of a malformed job is any text at all
    return escape(redact(text))


def _write_plain(message: Message) -> None:
    record = message.record
    stamp = record["time"].strftime("%Y-%m-%d %H:%M:%S")
    _emit(f"{stamp} {record['level'].name:<7} {_line(record)}", record)


def _write_journal(message: Message) -> None:
    record = message.record
    _emit(f"<{_PRIORITY.get(record['level'].name, 6)}>{_line(record)}", record)


def _emit(line: str, record: Record) -> None:
    lines = [line]
    if (exception := record["exception"]) is not None and exception.value is not None:
        import traceback  # only when something broke

        trace = traceback.format_exception(exception.type, exception.value, exception.traceback)
        lines += ["  " + escape(redact(part)) for chunk in trace for part in chunk.splitlines()]
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


class _ToLoguru(logging.Handler):
    """Carries what libraries log by `logging` over to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.opt(depth=6).log(record.levelname, "{}: {}", record.name, record.getMessage())


def configure(level: str) -> None:
    """Set the sinks up; called once, before anything is logged."""
    sink = _write_journal if os.environ.get("JOURNAL_STREAM") else _write_plain
    logger.remove()
    logger.add(sink, level=level, diagnose=False, backtrace=False, format="{message}")
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
