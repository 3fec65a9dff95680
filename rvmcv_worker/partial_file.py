"""A file on its way here: what has come, its running sha256, and what it may be continued with."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from rvmcv_worker.transfer import Opened


@dataclass
class PartialFile:
    """What is here so far, and how it is known."""

    file: BinaryIO
    done_bytes: int = 0
    etag: str | None = None
    total_bytes: int | None = None
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, chunk: bytes) -> None:
        """Keep the next bytes."""
        self.file.write(chunk)
        self.digest.update(chunk)
        self.done_bytes += len(chunk)

    def restart(self) -> None:
        """Forget everything."""
        self.file.seek(0)
        self.file.truncate()
        self.done_bytes, self.etag, self.total_bytes = 0, None, None
        self.digest = hashlib.sha256()

    def goes_on_with(self, answer: Opened) -> bool:
        """Whether the answer's bytes belong behind those that are here."""
        return (
            answer.start_bytes == self.done_bytes
            and answer.etag == self.etag
            and self.total_bytes in (None, answer.total_bytes)
        )


@contextlib.contextmanager
def new_file(dest: Path) -> Iterator[BinaryIO]:
    """A file that did not exist before, mode 0600, gone again when an error ends the block."""
    descriptor = os.open(dest, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
    except BaseException:
        dest.unlink(missing_ok=True)
        raise
