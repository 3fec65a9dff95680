"""The file by which a running worker is reached, for both its ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

FILE_NAME = "health.sock"
#: As which it is made, before it is moved to its own name.
PART_NAME = f".{FILE_NAME}.part"
#: How long somebody who listens may take to say so, in seconds.
_ANSWER_S = 5.0
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


def answers(file: Path) -> bool:
    """Whether somebody listens on the socket; raises `OSError` where that cannot be found out."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
        client.settimeout(_ANSWER_S)
        try:
            with socket_path(file) as path:
                client.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            pass  # the kernel keeps no more who wait for it
        return True
