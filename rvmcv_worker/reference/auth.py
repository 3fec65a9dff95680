"""Who may call what. Refusals look like Laravel's."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from rvmcv_worker.reference.services import InServices
from rvmcv_worker.reference.states import Ability
from rvmcv_worker.reference.tokens import Caller

#: Only for the OpenAPI document: `caller` below reads the header itself.
bearer = HTTPBearer(auto_error=False, description="A token of POST /api/v1/cv/tokens")


class LoginNeededError(Exception):
    """A request without a token that does not ask for JSON: Laravel sends it to the login page."""


async def caller(request: Request, services: InServices) -> Caller:
    """Return who sent the request; 401 without a valid token."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    found = None
    if scheme.lower() == "bearer":
        tokens, token = services.tokens, token.strip()
        found = tokens.recent_caller(token) or await run_in_threadpool(tokens.caller, token)
    if found is not None:
        return found
    if "application/json" not in request.headers.get("accept", ""):
        raise LoginNeededError
    raise HTTPException(401, "Unauthenticated.")


def needs(*abilities: Ability) -> Callable[[Caller], Awaitable[Caller]]:
    """Return a dependency that admits callers with any of these abilities; 403 for others."""

    async def check(who: Annotated[Caller, Depends(caller)]) -> Caller:
        if who.abilities.isdisjoint(abilities):
            raise HTTPException(403, "Invalid ability provided.")
        return who

    return check


AsWorker = Annotated[Caller, Depends(needs(Ability.WORKER))]
AsAdmin = Annotated[Caller, Depends(needs(Ability.ADMIN))]
AsWorkerOrAdmin = Annotated[Caller, Depends(needs(Ability.WORKER, Ability.ADMIN))]
AsEdgeOrAdmin = Annotated[Caller, Depends(needs(Ability.EDGE, Ability.ADMIN))]
AsEdge = Annotated[Caller, Depends(needs(Ability.EDGE))]
AsAnyone = Annotated[Caller, Depends(caller)]


def page_reader(request: Request, services: InServices) -> Caller:
    """Admit a browser by HTTP Basic: any user name, an admin's token as the password."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    try:
        _name, _, token = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        token = ""
    found = services.tokens.caller(token) if scheme.lower() == "basic" else None
    if found is None or Ability.ADMIN not in found.abilities:
        challenge = {"WWW-Authenticate": 'Basic realm="RVM-Server: the password is an admin token"'}
        raise HTTPException(401, "An admin token is needed as the password.", challenge)
    return found


AsPageReader = Annotated[Caller, Depends(page_reader)]
