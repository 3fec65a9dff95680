"""`GET /healthz` and `GET /readyz`: whether the daemon is alive, and whether it takes jobs.

Both only look at what the daemon's threads have noted. They ask neither disk nor GPU nor network, so that
they answer when those hang.
"""

from __future__ import annotations

from http import HTTPStatus

from rvmcv_worker.protocol import LaneClaims
from rvmcv_worker.routes import Answer
from rvmcv_worker.state import Condition
from rvmcv_worker.tick import Tick

#: The main loop ticks at least once a second; after so many without, it hangs.
HUNG_S = 10.0


def healthz(condition: Condition, tick: Tick) -> Answer:
    """Answer 200 while the main loop ticks, or is on its way out, which is bounded by itself."""
    age_s, stopping = tick.age_s(), condition.stopping.is_set()
    alive = stopping or age_s < HUNG_S
    body = {"alive": alive, "stopping": stopping, "tick_age_s": round(age_s, 3)}
    return Answer.of(body, HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE)


def readyz(condition: Condition, claims: LaneClaims) -> Answer:
    """Answer 200 while the worker takes jobs, and else 503; with the reasons in both cases."""
    ready = is_ready(claims)
    body = {
        "ready": ready,
        "state": condition.state(),
        "claims": claims.model_dump(),
        "reasons": condition.reasons(),
    }
    return Answer.of(body, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)


def is_ready(claims: LaneClaims) -> bool:
    """Whether some lane claims; one that is full counts, and a fault that stops no lane does no harm.

    A degraded worker is ready for what its other lanes take. That RVM-Server does not answer is not the
    worker's unreadiness: it asks on.
    """
    return any(claims.model_dump().values())
