"""The wish that a running job should end, and why; threads wait on it, selectors watch it."""

from __future__ import annotations

import enum
import os
import threading
from collections.abc import Callable

from rvmcv_worker.errors import FencedError, JobCancelledError, WorkerStoppedError


class StopReason(enum.Enum):
    """Why a running job must end; an earlier reason is overruled only by being fenced."""

    CANCELLED = "cancelled"  #: RVM-Server or the operator cancelled the job: report it, publish nothing
    FENCED = "fenced"  #: the job is another attempt's or over: publish and report nothing
    WORKER_STOPPED = "worker_stopped"  #: the daemon stops or drains: checkpoint and hand back


class Interrupt:
    """One job's wish to end: set once by whoever learns of it, seen by all who work on the job."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._branches: list[Interrupt] = []
        self._actions: list[Callable[[], None]] = []
        self._reason: StopReason | None = None
        self._detail = ""

    @property
    def reason(self) -> StopReason | None:
        """Why to end, or None while the job shall go on."""
        return self._reason

    def request(self, reason: StopReason, detail: str = "") -> None:
        """Ask for the end; the first reason stays, except that being fenced overrules all."""
        with self._lock:
            if self._closed:  # the job is over, and its descriptor's number may be another file's by now
                return
            if self._reason is None or reason is StopReason.FENCED:
                self._reason, self._detail = reason, detail
            self._event.set()
            os.eventfd_write(self._eventfd, 1)
            branches, actions = list(self._branches), list(self._actions)
        self._pass_on(branches)
        for action in actions:
            action()

    def call(self, action: Callable[[], None]) -> None:
        """Have `action`, which must not wait, called as soon as the end is asked for; now if it was."""
        with self._lock:
            self._actions.append(action)
            asked = self._reason is not None
        if asked:
            action()

    def call_no_more(self, action: Callable[[], None]) -> None:
        """Take back what was given to `call`."""
        with self._lock:
            self._actions.remove(action)

    def branch(self) -> Interrupt:
        """Return one that hears of every wish but a stop: for what is still saved in one."""
        branch = Interrupt()
        with self._lock:
            self._branches.append(branch)
        self._pass_on([branch])
        return branch

    def _pass_on(self, branches: list[Interrupt]) -> None:
        if self._reason not in {None, StopReason.WORKER_STOPPED}:
            for branch in branches:
                branch.request(self._reason, self._detail)

    def wait(self, timeout_s: float) -> bool:
        """Wait until asked to end, at most `timeout_s`; True when asked."""
        return self._event.wait(timeout_s)

    def fileno(self) -> int:
        """A descriptor that is readable from the moment the end was asked for (for selectors)."""
        return self._eventfd

    def check(self) -> None:
        """Raise the reason's exception when the end was asked for."""
        if self._reason is StopReason.CANCELLED:
            raise JobCancelledError(self._detail)
        if self._reason is StopReason.FENCED:
            raise FencedError(self._detail)
        if self._reason is StopReason.WORKER_STOPPED:
            raise WorkerStoppedError(self._detail)

    def close(self) -> None:
        """Give the descriptor back; a wish that comes later is for nobody."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._eventfd)
