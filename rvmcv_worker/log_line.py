"""What one event looks like: a line for people, an object of JSON, fields of the journal.

Whatever form it takes, secrets are masked in it and text from outside is escaped.
"""

from __future__ import annotations

import json
import math
from datetime import timezone
from typing import TYPE_CHECKING, Any

from rvmcv_worker.logs import escape, redact

if TYPE_CHECKING:
    from loguru import Record

#: syslog's priorities, which are the journal's too.
_PRIORITY = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "SUCCESS": 5, "INFO": 6, "DEBUG": 7, "TRACE": 7}
LEVELS = frozenset(_PRIORITY)
_MAX_JOB_ID_CHARS = 128  # the id of a malformed job is any text at all
#: As `journalctl -t` finds it, and as the unit's own lines have it.
_IDENTIFIER = "rvmcv-worker"


def priority(record: Record) -> int:
    """Return the level as the journal counts."""
    return _PRIORITY.get(record["level"].name, 6)


def text(record: Record) -> str:
    """Return ``job.claimed [<job>] <sentence>``, as far as there is an event and a job."""
    extra = record["extra"]
    names = [extra["event"]] if "event" in extra else []
    if job_id := _job_id(record):
        names.append(f"[{job_id}]")
    return " ".join([*names, _fit(record["message"])])


def trace(record: Record) -> list[str]:
    """Return the lines of the exception that was logged, without the values of variables."""
    if (exception := record["exception"]) is None or exception.value is None:
        return []
    import traceback  # only when something broke

    trace = traceback.format_exception(exception.type, exception.value, exception.traceback)
    return [_fit(part) for chunk in trace for part in chunk.splitlines()]


def as_json(record: Record) -> str:
    """Return one object on one line; keys that an event does not have are left out."""
    extra, lines = record["extra"], trace(record)
    stamp = record["time"].astimezone(timezone.utc).isoformat(timespec="milliseconds")
    said: dict[str, Any] = {
        "time": stamp.replace("+00:00", "Z"),
        "level": record["level"].name,
        "event": extra.get("event"),
        "job_id": _job_id(record),
        "message": _fit(record["message"]),
        **_details(record),
        "exception": "\n".join(lines) or None,
    }
    return json.dumps({key: value for key, value in said.items() if value is not None}, ensure_ascii=False)


def fields(record: Record, message: str) -> dict[str, str]:
    """Return the event as the journal's own fields, `message` being what a reader sees of it."""
    extra = record["extra"]
    own = {"event": extra.get("event"), "job_id": _job_id(record), **_details(record)}
    return {
        "MESSAGE": message,
        "PRIORITY": str(priority(record)),
        "SYSLOG_IDENTIFIER": _IDENTIFIER,
        **{f"RVMCV_{name.upper()}": str(value) for name, value in own.items() if value is not None},
    }


def _job_id(record: Record) -> str | None:
    job_id = record["extra"].get("job_id")
    return None if job_id is None else _fit(str(job_id)[:_MAX_JOB_ID_CHARS])


def _details(record: Record) -> dict[str, Any]:
    given: dict[str, Any] = record["extra"].get("details", {})
    return {
        name: value if value is None or _is_number(value) else _fit(str(value))
        for name, value in given.items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _fit(said: str) -> str:
    return escape(redact(said))
