"""A multipart/form-data body with one file, read from disk as it is sent.

`requests` reads a file of `files=` into memory whole, and a model has up to 200 MB.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from urllib3.fields import RequestField

_CHUNK_BYTES = 64 * 1024


class MultipartBody:
    """What `requests` takes as a stream of known length: it has `read`, `__iter__` and `__len__`."""

    def __init__(self, fields: Mapping[str, str], file_field: str, file_name: str, file: BinaryIO) -> None:
        """Send `file` from its start; it stays the caller's to close."""
        boundary = uuid.uuid4().hex
        self.content_type = f"multipart/form-data; boundary={boundary}"
        head = io.BytesIO()
        for name, value in fields.items():
            field = RequestField(name=name, data=value)
            field.make_multipart()
            head.write(f"--{boundary}\r\n{field.render_headers()}{value}\r\n".encode())
        field = RequestField(name=file_field, data="", filename=file_name)
        field.make_multipart(content_type="application/octet-stream")
        head.write(f"--{boundary}\r\n{field.render_headers()}".encode())
        tail = f"\r\n--{boundary}--\r\n".encode()
        size_bytes = os.fstat(file.fileno()).st_size
        self._length = head.tell() + size_bytes + len(tail)
        head.seek(0)
        file.seek(0)
        self._parts: list[BinaryIO] = [head, file, io.BytesIO(tail)]

    def __len__(self) -> int:
        return self._length

    def read(self, size: int = _CHUNK_BYTES) -> bytes:
        """Return the next bytes, at most `size`; empty at the end."""
        while self._parts:
            if data := self._parts[0].read(size):
                return data
            self._parts.pop(0)
        return b""

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.read, b"")
