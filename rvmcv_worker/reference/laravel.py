"""Answers in the shape that Laravel gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError
from starlette.responses import JSONResponse, RedirectResponse, Response

from rvmcv_worker.reference.auth import LoginNeededError
from rvmcv_worker.reference.refused import FieldRefusedError
from rvmcv_worker.reference.states import Reason
from rvmcv_worker.reference.turn import FencedError


def invalid(errors: dict[str, list[str]]) -> JSONResponse:
    """Return a 422 that names each field at fault."""
    first = next(iter(errors.values()))[0]
    return JSONResponse({"message": first, "errors": errors}, 422)


def invalid_fields(problems: Sequence[Any]) -> JSONResponse:
    """Return a 422 for pydantic's list of problems."""
    errors: dict[str, list[str]] = {}
    for problem in problems:
        if problem["type"] == "json_invalid":
            return invalid({"body": [f"the body is not JSON: {problem['ctx']['error']}"]})
        place = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query")) or "body"
        errors.setdefault(place, []).append(f"{place}: {problem['msg']}")
    return invalid(errors)


def add_exception_handlers(app: FastAPI) -> None:
    """Turn this package's exceptions into answers."""

    @app.exception_handler(RequestValidationError)
    def _invalid(_request: Request, error: RequestValidationError) -> Response:
        return invalid_fields(error.errors())

    @app.exception_handler(FieldRefusedError)
    def _refused(_request: Request, error: FieldRefusedError) -> Response:
        return invalid({error.field: [f"{error.field}: {error.message}"]})

    @app.exception_handler(FencedError)
    def _fenced(_request: Request, error: FencedError) -> Response:
        status = 404 if error.reason is Reason.UNKNOWN_JOB else 409
        return JSONResponse({"reason": error.reason.value, "message": error.message}, status)

    @app.exception_handler(DataError)
    def _unstorable(_request: Request, error: DataError) -> Response:
        return invalid({"body": [f"holds what the database cannot: {error.orig}"]})

    @app.exception_handler(LoginNeededError)
    def _login(_request: Request, _error: LoginNeededError) -> Response:
        return RedirectResponse("/login", 302)

    @app.exception_handler(401)
    @app.exception_handler(403)
    @app.exception_handler(404)
    @app.exception_handler(405)
    @app.exception_handler(409)
    @app.exception_handler(413)
    def _message(_request: Request, error: Any) -> Response:
        return JSONResponse({"message": error.detail}, error.status_code, error.headers)
