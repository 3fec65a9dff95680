"""The faults of today's RVM-Server, copied, so that the worker is tried against them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import select
from starlette.responses import HTMLResponse, JSONResponse, Response

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.laravel import invalid
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.settings import Gate
from rvmcv_worker.reference.storage import Storage, StoredObject
from rvmcv_worker.reference.tables import ModelVersion

#: nginx's default for ``client_max_body_size``.
NGINX_BYTES = 2**20
#: PHP's defaults for ``upload_max_filesize`` and ``post_max_size``.
PHP_FILE_BYTES = 2 * 2**20
PHP_POST_BYTES = 8 * 2**20
ZIP_MAGIC = b"PK\x03\x04"
NGINX_413 = (
    "<html>\r\n<head><title>413 Request Entity Too Large</title></head>\r\n<body>\r\n"
    "<center><h1>413 Request Entity Too Large</h1></center>\r\n"
    "<hr><center>nginx/1.24.0 (Ubuntu)</center>\r\n</body>\r\n</html>\r\n"
)


def gate_for_body(gates: frozenset[Gate], body_bytes: int) -> Response | None:
    """Return what stops a request before it reaches the application; None when it may pass."""
    if Gate.NGINX in gates and body_bytes > NGINX_BYTES:
        return HTMLResponse(NGINX_413, 413, {"Connection": "close"})
    if Gate.PHP in gates and body_bytes > PHP_POST_BYTES:
        return JSONResponse({"message": "The POST data is too large."}, 413)
    return None


def gate_for_file(gates: frozenset[Gate], size_bytes: int, start: bytes) -> Response | None:
    """Return what the application's validation says of the file; None when it may pass."""
    if Gate.PHP in gates and size_bytes > PHP_FILE_BYTES:
        return invalid({"model_file": ["The model file failed to upload."]})
    if Gate.MIMES in gates and start == ZIP_MAGIC:
        return invalid({"model_file": ["The model file field must be a file of type: pt, onnx."]})
    return None


def upload_model(
    queue: Queue, storage: Storage, upload: wire.ModelUpload, file: Path, found: StoredObject
) -> ModelVersion | None:
    """Store the file first and the row second; None where today's server answers 500.

    The lease token is ignored, and a repeated version overwrites the bytes of the old row.
    """
    path = storage.put_file("models", f"{upload.model_name}_{upload.version}.pt", file)
    same = (ModelVersion.model_name == upload.model_name) & (ModelVersion.version == upload.version)
    with queue.turn() as turn:
        if turn.session.scalar(select(ModelVersion.id).where(same)) is not None:
            return None
        model = ModelVersion(
            model_name=upload.model_name,
            version=upload.version,
            file_path=path,
            sha256_hash=found.sha256,
            size_bytes=found.size_bytes,
            file_size_mb=round(found.size_bytes / 2**20, 2),
            metrics=upload.metrics,
            training_job_id=upload.training_job_id,
            usable=True,
            is_active=False,
            created_at=turn.now,
        )
        turn.session.add(model)
        turn.session.flush()
        return model


def server_error(message: str) -> Response:
    """Return the 500 of an exception that Laravel did not expect."""
    body: dict[str, Any] = {"status": "error", "message": message}
    return JSONResponse(body, 500)
