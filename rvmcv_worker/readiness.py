"""`GET /healthz` and `GET /readyz`: whether the daemon is alive, and whether it takes jobs.

Both only look at what the daemon's threads have noted. They ask neither disk nor GPU nor network, so that
they answer when those hang.
"""

from __future__ import annotations

from http import HTTPStatus

from rvmcv_worker.attempt import Services
from rvmcv_worker.heartbeat import Heartbeat
from rvmcv_worker.routes import Answer, Routes
from rvmcv_worker.tick import Tick

#: The main loop ticks at least once a second; after so many without, it hangs.
HUNG_S = 10.0


def is_alive(services: Services, tick: Tick) -> bool:
    """Whether the main loop ticks, or is on its way out, which is bounded by itself and by systemd."""
    return services.condition.stopping.is_set() or tick.age_s() < HUNG_S


def is_ready(heartbeat: Heartbeat) -> bool:
    """Whether some lane claims; one that is full counts, and a fault that stops no lane does no harm.

    A degraded worker is ready for what its other lanes take. That RVM-Server does not answer is not the
    worker's unreadiness: it asks on.
    """
    return any(heartbeat.claims().model_dump().values())


def routes(services: Services, heartbeat: Heartbeat, tick: Tick) -> Routes:
    """Return both routes."""

    def healthz() -> Answer:
        alive = is_alive(services, tick)
        body = {"alive": alive, "tick_age_s": round(tick.age_s(), 3)}
        return Answer.of(body, HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE)

    def readyz() -> Answer:
        condition, ready = services.condition, is_ready(heartbeat)
        body = {
            "ready": ready,
            "state": condition.state(),
            "claims": heartbeat.claims().model_dump(),
            "reasons": condition.reasons(),
        }
        return Answer.of(body, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)

    return {("GET", "/healthz"): healthz, ("GET", "/readyz"): readyz}
