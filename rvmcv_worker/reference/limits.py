"""What a request's body may be: how large, and of which type. Checked before anything parses it."""

from __future__ import annotations

import json
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rvmcv_worker.reference.settings import Settings

API = "/api/v1"
UPLOAD_MODEL = f"{API}/cv/upload-model"
DATASETS = f"{API}/cv/datasets"
JOB_STATUS = f"{API}/cv/job-status"


class BodyLimits:
    """ASGI middleware: 413 above the limit of the path, 415 for a body that is not JSON."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._limits = {
            UPLOAD_MODEL: settings.upload_limit_bytes,
            DATASETS: settings.dataset_limit_bytes,
            JOB_STATUS: settings.report_limit_bytes,
        }
        self._default_bytes = settings.json_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit_bytes = self._limits.get(scope["path"], self._default_bytes)
        length = headers.get("content-length", "0")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        has_body = length != "0" or "transfer-encoding" in headers
        allowed = ["application/json"]
        if scope["path"] in (UPLOAD_MODEL, DATASETS):
            allowed.append("multipart/form-data")
        if not length.isdecimal() or int(length) > limit_bytes:
            await _refuse(413, _too_large(limit_bytes))(scope, receive, send)
        elif has_body and kind not in allowed:
            await _refuse(415, f"The content type must be {' or '.join(allowed)}.")(scope, receive, send)
        else:
            await self._app(scope, _counted(receive, limit_bytes), send)


def _counted(receive: Receive, limit_bytes: int) -> Receive:
    """Return the same stream, cut off by a 413 where a chunked body goes over the limit."""
    seen_bytes = 0

    async def counted() -> Message:
        nonlocal seen_bytes
        message = await receive()
        seen_bytes += len(message.get("body", b""))
        if seen_bytes > limit_bytes:
            raise HTTPException(413, _too_large(limit_bytes), {"Connection": "close"})
        return message

    return counted


def _too_large(limit_bytes: int) -> str:
    return f"The body must not be larger than {limit_bytes} bytes."


def _refuse(status: int, message: str) -> JSONResponse:
    # The rest of the body is not read, so the connection cannot be used again.
    return JSONResponse({"message": message}, status, {"Connection": "close"})


class StrictJsonRequest(Request):
    """A request whose JSON is JSON: Python's parser would also take NaN and Infinity."""

    async def json(self) -> Any:
        """Parse the body; raises `json.JSONDecodeError`."""
        if not hasattr(self, "_json"):
            self._json = json.loads(await self.body(), parse_constant=_refuse_constant)
        return self._json


def _refuse_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is not JSON; a number that is not finite is null", name, 0)
