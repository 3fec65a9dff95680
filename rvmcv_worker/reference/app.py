"""The HTTP application: routes, limits and answers put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI

from rvmcv_worker.reference.auth import bearer
from rvmcv_worker.reference.laravel import add_exception_handlers
from rvmcv_worker.reference.limits import BodyLimits
from rvmcv_worker.reference.routes import admin, alerts, batches, edge, inference, pages, storage, worker
from rvmcv_worker.reference.services import Services

DESCRIPTION = """
What RVM-Server speaks with `rvmcv-worker`, with its admins and with RVM-Edge. The reference server
answers exactly so; this document is the specification of the server's side.

Every request carries `Authorization: Bearer <token>` and `Accept: application/json`. A request that
does not validate gets a 422 that names the field; an attempt that no longer holds its job gets a
404 or 409 with a `reason`.
"""


def make_app(services: Services) -> FastAPI:
    """Return the application of one server."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with services.queue.wakeup.heeding():
            yield

    app = FastAPI(title="RVM-Server, reference", version="1", description=DESCRIPTION, lifespan=lifespan)
    app.state.services = services
    app.add_middleware(BodyLimits, settings=services.settings)
    add_exception_handlers(app)
    for part in (worker, storage, admin, inference, batches, alerts, edge):
        app.include_router(part.router, dependencies=[Depends(bearer)])
    app.include_router(pages.router)
    return app
