"""One line an event, on standard error; secrets masked, text from outside escaped.

Under systemd each line carries its journald priority as a ``<n>`` prefix and no time of its own.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from loguru import logger

from rvmcv_worker.events import Event, event

if TYPE_CHECKING:
    from loguru import Message, Record

_PRIORITY = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "SUCCESS": 5, "INFO": 6, "DEBUG": 7, "TRACE": 7}
_WORD = re.compile(r"[^\s\"'<>]+")
#: What may be a secret by its name or place: a signature, a login, a header.
_NAMED = re.compile(
    r"(?i)((?:x-amz-(?:signature|credential|security-token)|awsaccesskeyid|signature|credential|token|secret"
    r"|password)(?:=|%3d)|(?:bearer|basic)\s+(?=[^\s\"'<>]{16}))[^\s&\"'<>\\]+"
)
_LOGIN = re.compile(r"(://)[^/@\s\"'<>]*@")
_MASK = "********"
#: Shorter secrets are not masked: that would hide every other word; nor is a short end of a token.
_MIN_CHARS = 4
_MIN_TAIL = 16
_QUOTED = re.compile(r"%[0-9A-F]{2}")

_secrets: set[str] = set()
_secrets_lock = threading.Lock()


def mask(*secrets: str) -> None:
    """Never print these strings again, nor as a URL or PHP's JSON would have them.

    Of a token of Laravel's, ``12|abc…``, what follows the ``|`` opens as much as the whole.
    """
    with _secrets_lock:
        for secret in secrets:
            if len(secret) >= _MIN_CHARS:
                _secrets.update(_forms(secret))
            if len(tail := secret.rpartition("|")[2]) >= _MIN_TAIL:
                _secrets.update(_forms(tail))


def _forms(secret: str) -> set[str]:
    quoted = quote(secret, safe="")
    lower = _QUOTED.sub(lambda found: found.group().lower(), quoted)
    return {secret, quoted, lower, secret.replace("/", "\\/")}


def redact(text: str) -> str:
    """Return `text` without secrets and without the queries of URLs, which may hold a signature."""
    with _secrets_lock:
        known = sorted(_secrets, key=len, reverse=True)  # one may hold another
    for secret in known:
        text = text.replace(secret, _MASK)
    if "?" in text:
        text = _WORD.sub(_cut_query, text)
    return _LOGIN.sub(rf"\1{_MASK}@", _NAMED.sub(rf"\1{_MASK}", text))


def _cut_query(word: re.Match[str]) -> str:
    path, _, query = word.group().partition("?")
    return f"{path}?…" if query and "/" in path else word.group()


def redact_all(value: Any) -> Any:
    """Return JSON's `value` with every string in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [redact_all(each) for each in value]
    if isinstance(value, dict):
        return {redact_all(key): redact_all(each) for key, each in value.items()}
    return value


def escape(text: str) -> str:
    """Return text from outside as one line that no terminal, journal or page can be misled by.

    What does not print is escaped: controls, line breaks of every script, marks that turn the direction of
    writing, odd blanks, halves of surrogate pairs.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _line(record: Record) -> str:
    text = record["message"]
    if job_id := record["extra"].get("job_id"):
        text = f"[{job_id[:128]}] {text}"  # the id of a malformed job is any text at all
    return escape(redact(text))


def _write_plain(message: Message) -> None:
    record = message.record
    stamp = record["time"].strftime("%Y-%m-%d %H:%M:%S")
    _emit([f"{stamp} {record['level'].name:<7} {_line(record)}", *_trace(record)])


def _write_journal(message: Message) -> None:
    record = message.record
    priority = f"<{_PRIORITY.get(record['level'].name, 6)}>"
    # On each line: journald would take a priority that a later line begins with.
    _emit([f"{priority}{line}" for line in (_line(record), *_trace(record))])


def _trace(record: Record) -> list[str]:
    """Return the lines of the exception that was logged, without the values of variables."""
    if (exception := record["exception"]) is None or exception.value is None:
        return []
    import traceback  # only when something broke

    trace = traceback.format_exception(exception.type, exception.value, exception.traceback)
    return ["  " + escape(redact(part)) for chunk in trace for part in chunk.splitlines()]


def _emit(lines: list[str]) -> None:
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


def log_uncaught(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """Log what ended the process; Python's own way would print it as it is (see `sys.excepthook`)."""
    event(Event.WORKER_DIED).opt(exception=error).critical("the worker ends of a fault of its own")


class _ToLoguru(logging.Handler):
    """Carries what libraries log by `logging` over to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        # A library may have levels of its own, which loguru knows by their numbers alone.
        level = record.levelname if record.levelname in _PRIORITY else record.levelno
        event(Event.LIBRARY_WARNED).opt(depth=6).log(level, "{}: {}", record.name, record.getMessage())


def configure(level: str) -> None:
    """Set the sinks up; called once, before anything is logged."""
    sink = _write_journal if os.environ.get("JOURNAL_STREAM") else _write_plain
    logger.remove()
    logger.add(sink, level=level, diagnose=False, backtrace=False, format="{message}")
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    # What it warns of comes as an exception too; its text holds pieces of answers, lease tokens among them.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
