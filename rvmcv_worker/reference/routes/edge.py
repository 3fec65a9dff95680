"""What RVM-Edge calls: the handshake for the active model, and its bytes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import Response

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.activation import EDGE_MODEL, active_model, was_activated
from rvmcv_worker.reference.auth import AsEdge
from rvmcv_worker.reference.files import send_object
from rvmcv_worker.reference.services import InServices
from rvmcv_worker.reference.storage import ObjectMissingError

router = APIRouter(prefix="/api/v1/edge", tags=["edge"])


@router.get("/model-sync", response_model=wire.ActiveModel)
def model_sync(
    services: InServices,
    _who: AsEdge,
    current_hash: Annotated[
        str | None, Query(description="sha256 of the model that the machine runs")
    ] = None,
) -> wire.ActiveModel:
    """Tell which detector RVM-Edge should run."""
    # Today's server takes the newest active model whatever its name, a SAM2 too.
    name = None if services.settings.as_today else EDGE_MODEL
    with services.queue.look() as turn:
        model = active_model(turn, name)
    if model is None:
        raise HTTPException(404, "No model is active.")
    data = wire.ActiveModelData(
        update_available=model.sha256_hash != current_hash,
        model_name=model.model_name,
        version=model.version,
        sha256_hash=model.sha256_hash,
        file_size_mb=model.file_size_mb,
        download_url=f"/api/v1/edge/download-model/{model.sha256_hash}",
    )
    return wire.ActiveModel(data=data)


@router.get("/download-model/{sha256}")
def download_active_model(sha256: str, request: Request, services: InServices, _who: AsEdge) -> Response:
    """Send a model that is, or was, active; no other leaves the server this way."""
    model = services.models.find(sha256)
    with services.queue.look() as turn:
        if model is None or model.sha256_hash != sha256 or not was_activated(turn, model):
            raise HTTPException(404, "Model not found.")
    try:
        return send_object(services.storage, model.file_path, sha256, request.headers.get("range"))
    except ObjectMissingError as error:
        raise HTTPException(404, str(error)) from None
