"""Secrets that are looked for wherever they must not be, in every form that text takes on its way."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

#: Shorter ones stand for a wrong token in a test, and would be found by chance.
MIN_CHARS = 16
_MAX_FILE_BYTES = 64_000_000
#: Larger files of a daemon's state are models, which came from the server.
_MAX_LEFT_BYTES = 2_000_000
#: What is raised for an archive that is cut off, encrypted or no archive after all.
_DAMAGED = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile)


def forms(secret: str) -> frozenset[bytes]:
    """Return a secret as it is, as a URL has it, in hexadecimal, and in base64 at any place."""
    raw = secret.encode()
    found = {raw, quote(secret, safe="").encode(), raw.hex().encode(), raw.hex().upper().encode()}
    for before in range(3):
        first, last = -(-before * 8 // 6), (before + len(raw)) * 8 // 6  # what its own bits decide
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            found.add(encode(bytes(before) + raw)[first:last])
    return frozenset(found)


class Canaries:
    """Secrets by name."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        assert all(len(secret) >= MIN_CHARS for secret in secrets.values())
        self._forms = {name: forms(secret) for name, secret in secrets.items()}

    def names_in(self, content: bytes) -> set[str]:
        """Return the names of those that `content` holds, packed or not."""
        found = set()
        for each in _unpacked(content):
            found |= {name for name, known in self._forms.items() if any(form in each for form in known)}
        return found

    def search(
        self, root: Path, exempt: Iterable[Path] = (), *, max_bytes: int = _MAX_FILE_BYTES
    ) -> list[str]:
        """Return "name: file" for each that a file beneath `root` holds; larger files and `exempt` may."""
        allowed = set(exempt)
        found = []
        for file in [root] if root.is_file() else sorted(root.rglob("*")):
            if file.is_symlink() or not file.is_file() or file in allowed:
                continue
            if file.stat().st_size <= max_bytes:
                found += [f"{name}: {file}" for name in sorted(self.names_in(file.read_bytes()))]
        return found


def _unpacked(content: bytes) -> Iterator[bytes]:
    """Yield `content`, and what it holds packed: of a bomb the start, of what is damaged nothing."""
    yield content
    with contextlib.suppress(*_DAMAGED):
        if content.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
                yield packed.read(_MAX_FILE_BYTES)
        elif content.startswith(b"PK") and zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for entry in archive.infolist():
                    with archive.open(entry) as file:
                        yield file.read(_MAX_FILE_BYTES)


#: What the daemons of this run were given, by the directory in which each left its log and its state.
handed_out: dict[Path, set[str]] = {}


def hand_out(directory: Path, *secrets: str) -> None:
    """Remember that a daemon knows `secrets`: none may be in what it leaves."""
    handed_out.setdefault(directory, set()).update(each for each in secrets if len(each) >= MIN_CHARS)


def left_behind() -> list[str]:
    """Return where daemons of this run left a secret, in what is still there of log and state."""
    found = []
    for directory, secrets in handed_out.items():
        canaries = Canaries({f"secret {number}": each for number, each in enumerate(sorted(secrets), 1)})
        for place, max_bytes in (("worker.log", _MAX_FILE_BYTES), ("state", _MAX_LEFT_BYTES)):
            with contextlib.suppress(OSError):  # a test has taken it away, or its rights
                found += canaries.search(directory / place, max_bytes=max_bytes)
    return found
