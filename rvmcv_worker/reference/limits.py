"""What a request's body may be: how large, and of which type. Checked before anything parses it."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rvmcv_worker.reference.settings import Settings

API = "/api/v1"
UPLOAD_MODEL = f"{API}/cv/upload-model"
DATASETS = f"{API}/cv/datasets"
JOB_STATUS = f"{API}/cv/job-status"
PLAYGROUND = f"{API}/cv/playground-inference"
BATCH = f"{API}/cv/batch-inference"
FORM = "multipart/form-data"


class BodyLimits:
    """ASGI middleware: 413 above the limit of the path, 415 for a body that is not JSON."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        #: Of forms, which other paths do not take.
        self._form_limits = {
            UPLOAD_MODEL: settings.upload_limit_bytes,
            DATASETS: settings.dataset_limit_bytes,
            PLAYGROUND: settings.image_limit_bytes,
            BATCH: settings.manifest_limit_bytes,
        }
        self._json_limits = {JOB_STATUS: settings.report_limit_bytes}
        self._default_bytes = settings.json_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        has_body = length != "0" or "transfer-encoding" in headers
        allowed = ["application/json"]
        limit_bytes = self._json_limits.get(scope["path"], self._default_bytes)
        if scope["path"] in self._form_limits:
            allowed.append(FORM)
            if kind == FORM:
                limit_bytes = self._form_limits[scope["path"]]
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


class StrictJsonRoute(APIRoute):
    """A route whose handler sees a `StrictJsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Any]]:
        """Return the handler that the framework calls."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Any:
            return await handler(StrictJsonRequest(request.scope, request.receive))

        return strict


def _refuse_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is not JSON; a number that is not finite is null", name, 0)
