"""What a request works with, put together once per server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from rvmcv_worker.reference.batches import Batches
from rvmcv_worker.reference.datasets import DatasetShelf
from rvmcv_worker.reference.held_answers import HeldAnswers
from rvmcv_worker.reference.models import ModelShelf
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.settings import Settings
from rvmcv_worker.reference.storage import Storage
from rvmcv_worker.reference.tokens import Tokens


@dataclass(frozen=True)
class Services:
    """One server's parts."""

    settings: Settings
    queue: Queue
    storage: Storage
    models: ModelShelf
    datasets: DatasetShelf
    tokens: Tokens
    batches: Batches
    held: HeldAnswers


# Asynchronous, though it waits for nothing: the framework would send it to a thread otherwise.
async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


InServices = Annotated[Services, Depends(_services)]
