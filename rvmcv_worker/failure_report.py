"""Tells RVM-Server that the worker has failed for good: what the unit of `OnFailure=` runs.

It speaks as the daemon that failed, under its `instance_id`: a new one would end the old attempts at
once, and a start within their leases could not bring their checkpoints to storage any more. It names no
leases, so they run out, and other workers get the jobs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path

from rvmcv_worker import __version__, config, instance
from rvmcv_worker.config import ConfigError, Settings
from rvmcv_worker.controller import Controller, ControllerError, RequestRejectedError
from rvmcv_worker.protocol import LaneClaims, WorkerState, WorkerStatus
from rvmcv_worker.retry import Retry, RetryStoppedError
from rvmcv_worker.token_source import TokenSource

#: How long RVM-Server is tried, in seconds; the unit gives it a minute more.
PATIENCE_S = 300.0
#: Longest report of why, in characters.
_LONGEST = 2000
_TO_DO = (
    "it stays off until somebody starts it: on its machine journalctl -u rvmcv-worker says more, then"
    " systemctl reset-failed rvmcv-worker; systemctl start rvmcv-worker"
)


class NotReportedError(Exception):
    """RVM-Server does not know; the message says why."""


def what_it_needs(file: Path) -> tuple[Settings, str | None]:
    """Return the settings, as far as speaking to RVM-Server goes, and what is wrong with the others.

    A wrong key elsewhere may be why the worker does not start. Raises `ConfigError`.
    """
    try:
        return config.load(file), None
    except ConfigError as error:
        return config.load_to_speak(file), str(error)


def report(
    settings: Settings, why: str, *, runs_again: Callable[[], bool], patience_s: float = PATIENCE_S
) -> bool:
    """Deliver it; False where the worker `runs_again`, and so speaks for itself.

    Raises `ConfigError` without a token, and `NotReportedError`.
    """
    token = TokenSource(settings)
    state_dir = settings.worker.state_dir
    controller = Controller(settings, token, instance.last(state_dir) or str(uuid.uuid4()))
    failure = f"the worker has failed: {why}; {_TO_DO}"[:_LONGEST]
    status = WorkerStatus(
        worker_id=settings.worker.id,
        instance_id=controller.instance_id,
        version=__version__,
        state=WorkerState.DEGRADED,
        reasons=[failure],
        claims=LaneClaims(train=False, infer=False, batch=False),
        uptime_s=0,
        sandbox="none",
        failure=failure,
    )

    def tell() -> bool:
        if runs_again():
            return False
        try:
            answer = controller.worker_status(status)
        except (
            RequestRejectedError
        ):  # a server of before `failure` may refuse the field; `reasons` say the same
            answer = controller.worker_status(status.model_copy(update={"failure": None}))
        if answer.superseded:
            raise NotReportedError(
                "RVM-Server has since heard of another daemon of this worker's id, and takes that one's word"
            )
        return True

    try:
        return Retry(settings, token).call(tell, stop=_Deadline(settings.scaled(patience_s)))
    except RetryStoppedError as error:
        raise NotReportedError(f"not within {patience_s:.0f} s: {error.__cause__}") from None
    except ControllerError as error:
        raise NotReportedError(str(error)) from None


class _Deadline:
    """Ends the waits between tries when the time is over."""

    def __init__(self, patience_s: float) -> None:
        self._until_s = time.monotonic() + patience_s

    def wait(self, timeout_s: float, /) -> bool:
        """Wait, but not past the deadline; True when that is reached."""
        time.sleep(max(0.0, min(timeout_s, self._until_s - time.monotonic())))
        return time.monotonic() >= self._until_s
