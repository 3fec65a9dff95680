"""Alerts: listed and acknowledged."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException

from rvmcv_worker.reference import inference_wire
from rvmcv_worker.reference.alerts import acknowledge, page_of_alerts, view_of_alert
from rvmcv_worker.reference.auth import AsAdmin
from rvmcv_worker.reference.routes.inference import Page, PerPage
from rvmcv_worker.reference.services import InServices
from rvmcv_worker.reference.states import AlertKind

router = APIRouter(prefix="/api/v1/cv", tags=["alerts"])


@router.get("/alerts", response_model=inference_wire.AlertPage)
def list_alerts(
    services: InServices,
    _who: AsAdmin,
    kind: AlertKind | None = None,
    acknowledged: bool | None = None,
    page: Page = 1,
    per_page: PerPage = 20,
) -> inference_wire.AlertPage:
    """List what people should know of, newest first: mismatches, failed and poisoned jobs, silent workers."""
    with services.queue.look() as turn:
        return page_of_alerts(turn, kind=kind, acknowledged=acknowledged, page=page, per_page=per_page)


@router.post("/alerts/{alert_id}/acknowledge", response_model=inference_wire.AlertView)
def acknowledge_alert(alert_id: int, services: InServices, who: AsAdmin) -> inference_wire.AlertView:
    """Note that somebody has seen to it; repeated, the first one's name stays."""
    with services.queue.turn() as turn:
        alert = acknowledge(turn, alert_id, who.name)
        if alert is None:
            raise HTTPException(404, "Alert not found.")
        return view_of_alert(alert)
