"""`requirements.lock` as it stands, and which of it is installed here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements.lock"

_PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)")
_HASH = re.compile(r"--hash=(\w+):([0-9a-f]+)")


@dataclass(frozen=True)
class Requirement:
    """One entry: a package may have several, for different versions of Python."""

    name: str
    version: str
    hashes: tuple[tuple[str, str], ...]  #: (algorithm, hex digits)


class LockError(Exception):
    """A line that no lock of ours has; the message shows it."""


def read(text: str) -> list[Requirement]:
    """Return every entry; raise `LockError` for what is none: an option, a URL, a version not pinned."""
    entries = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        entry = line.partition(" #")[0].strip()
        if not entry or entry.startswith("#"):
            continue
        pinned = _PINNED.match(entry)
        if pinned is None or "://" in entry or " @ " in entry:
            raise LockError(f"not a package pinned to a version: {entry[:100]}")
        entries.append(Requirement(normal(pinned[1]), pinned[2], tuple(_HASH.findall(entry))))
    return entries


def installed() -> list[Distribution]:
    """Return what is installed of the lock, by name; the rest is for other systems."""
    wanted = {entry.name for entry in read(LOCK.read_text(encoding="utf-8"))}
    found = {normal(each.metadata["Name"]): each for each in distributions()}
    return [found[name] for name in sorted(wanted & found.keys())]


def normal(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
