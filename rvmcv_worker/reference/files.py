"""Files that come in with a form, and objects that go out over HTTP."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from starlette.responses import Response, StreamingResponse

from rvmcv_worker.reference.storage import CHUNK_BYTES, Storage, StoredObject

_RANGE = re.compile(r"^bytes=(\d+)-$")


@contextmanager
def received(source: BinaryIO) -> Iterator[tuple[Path, StoredObject]]:
    """Copy an uploaded file to disk, hashing it; the copy is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rvmcv-reference-") as folder:
        file = Path(folder) / "upload"
        with file.open("wb") as copy:
            shutil.copyfileobj(source, copy, CHUNK_BYTES)
        with file.open("rb") as copy:
            digest = hashlib.sha256()
            while chunk := copy.read(CHUNK_BYTES):
                digest.update(chunk)
        yield file, StoredObject(digest.hexdigest(), file.stat().st_size)


def send_object(storage: Storage, path: str, sha256: str, wanted_range: str | None) -> Response:
    """Answer with an object, or with its rest: ``Range: bytes=N-`` resumes a download that was cut.

    Raises `ObjectMissingError`.
    """
    size_bytes = storage.size_bytes(path)
    headers = {"X-SHA256-Hash": sha256, "Accept-Ranges": "bytes", "ETag": f'"{sha256}"'}
    resumed = _RANGE.match(wanted_range or "")
    start = int(resumed[1]) if resumed else 0
    if resumed and start >= size_bytes:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size_bytes}"})
    if resumed:
        headers["Content-Range"] = f"bytes {start}-{size_bytes - 1}/{size_bytes}"
    headers["Content-Length"] = str(size_bytes - start)
    return StreamingResponse(
        storage.read(path, start),
        status_code=206 if resumed else 200,
        headers=headers,
        media_type="application/octet-stream",
    )
