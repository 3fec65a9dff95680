"""What a log, a report or a page may show: secrets are masked, text from outside is escaped."""

from __future__ import annotations

import re
import threading
from typing import Any
from urllib.parse import quote

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
