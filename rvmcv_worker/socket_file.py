"""The file by which a running worker is reached, for both its ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

FILE_NAME = "health.sock"
#: The kernel's limit for the path of a unix socket, in bytes, with its final zero.
_MAX_PATH_BYTES = 108


@contextlib.contextmanager
def socket_path(file: Path) -> Iterator[str]:
    """A path to bind or connect to: of a file whose own is too long, one by way of its directory."""
    if len(os.fsencode(file)) < _MAX_PATH_BYTES:
        yield str(file)
        return
    directory = os.open(file.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{file.name}"
    finally:
        os.close(directory)
