"""What a published model may not tell: where it was made and by whom, and secrets of any kind.

A training of ours writes none of it. This looks again, at what came out: a library's new version may write
down more than the last, and a training is a stranger's process.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Collection, Iterator
from typing import Any

from rvmcv_worker.errors import ModelInvalidError

#: What it is -> how it looks. The text itself is never told: it would go on into logs. Repeats are
#: bounded: of a stranger's text of 16 MB each place is looked at once.
_SECRETS = {
    "a URL with a user or password": re.compile(r"://[^/\s@]{1,200}@"),
    "a presigned URL": re.compile(
        r"X-Amz-(Signature|Credential|Security-Token)|[?&](Signature|sig|token)=", re.IGNORECASE
    ),
    "a bearer token": re.compile(r"\bBearer\s{1,4}[\w.~+/|-]{8}", re.IGNORECASE),
    "a private key": re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY"),
    "an access key": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}|\bgh[pousr]_\w{20}|\bhf_\w{20}|\bsk-[\w-]{20}"),
    "a password or key": re.compile(
        r"(password|passwd|secret|token|api[_-]?key)[\w-]{0,40}\s{0,4}[=:]\s{0,4}\S", re.IGNORECASE
    ),
    "the address of a person or host": re.compile(r"\w@[A-Za-z]"),
}
#: Names that machines and users share all over the world, and what both are called behind the wall.
_OF_NO_PLACE = frozenset({"root", "localhost", "nobody", "user", "job"})
_MIN_WORD = 3


def refuse_secrets(name: str, texts: Collection[str], allowed: Collection[str]) -> None:
    """Raise `ModelInvalidError` for a text in the file `name` that looks like a secret.

    `allowed` are the data set's own words: a class may be called anything.
    """
    for text in texts:
        if text in allowed:
            continue
        if kind := next((kind for kind, pattern in _SECRETS.items() if pattern.search(text)), None):
            raise ModelInvalidError(f"{name} holds {kind}; no training of ours writes one")


def refuse_place(name: str, metadata: Any, allowed: Collection[str]) -> None:
    """Raise `ModelInvalidError` for a value in `metadata` that names this machine, or its user.

    `allowed` are values that mean something else whoever is called so: class names, settings' own words.
    """
    words = machine_words()
    if not words:
        return
    pattern = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(map(re.escape, words))})(?![A-Za-z0-9])")
    if any(text not in allowed and pattern.search(text) for text in values(metadata)):
        raise ModelInvalidError(
            f"{name} names the machine or the user that trained it; no training of ours does"
        )


def machine_words() -> list[str]:
    """Return what this machine and user are called, as any process here can find out."""
    host = os.uname().nodename
    found = {host, host.partition(".")[0], os.environ.get("USER", ""), os.environ.get("LOGNAME", "")}
    with contextlib.suppress(KeyError):  # behind the wall there is no list of users
        found.add(pwd.getpwuid(os.getuid()).pw_name)
    return sorted(word for word in found - _OF_NO_PLACE if len(word) >= _MIN_WORD)


def values(content: Any) -> Iterator[str]:
    """Yield every text in plain containers, but for the keys of dicts; each container once."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, (dict, list, tuple, set)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
