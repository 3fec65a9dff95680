"""How far a job is, told to RVM-Server: the newest state wins, but no epoch is lost.

A thread of its own per job, so that a slow server delays no job. Each accepted report renews the
lease, and its answer may say `cancel`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from loguru import logger

from rvmcv_worker.controller import Controller, ControllerError, RequestRejectedError, TooLargeError
from rvmcv_worker.errors import FencedError
from rvmcv_worker.events import Event, event
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.logs import redact
from rvmcv_worker.progress_log import ProgressLog
from rvmcv_worker.protocol import Checkpoint, Directive, Progress, progress_of, to_wire
from rvmcv_worker.retry import RETRYABLE, Retry, RetryStoppedError

#: Answers to a report that is not to be taken as it is.
_REFUSED = (RequestRejectedError, TooLargeError)
#: Seconds between two looks at whether the end is asked for, while another report is on its way.
_TURN_LOOK_S = 0.2
#: Between two reports at least, in seconds, whatever the server asks for: a lease of 1e-300 s is no hot loop.
_LEAST_S = 0.01
#: Epochs in one report: after a long outage the rest follows in the next ones.
_EPOCHS_A_REPORT = 200
#: Epochs that wait for RVM-Server at most, and characters of each; a child that sends more is no training.
#: Together they are what a hostile one may take of the daemon's memory.
_MAX_EPOCHS, _MAX_EPOCH_CHARS = 20_000, 4000


class ProgressReporter:
    """Tells RVM-Server how one attempt gets on; a context manager around the attempt."""

    def __init__(
        self,
        controller: Controller,
        retry: Retry,
        *,
        job_id: str,
        lease_token: str,
        interval_s: float,
        keep_alive_s: float,
        interrupt: Interrupt,
        state: dict[str, Any] | None = None,
        first_s: float = 0.0,
        log: ProgressLog | None = None,
    ) -> None:
        """`state` is where the newest progress is kept, for others to read.

        The first report waits `first_s`; `log` is told too.
        """
        self._controller = controller
        self._retry = retry
        self._job_id = job_id
        self._lease_token = lease_token
        self._interval_s = max(interval_s, _LEAST_S)
        self._keep_alive_s = max(keep_alive_s, _LEAST_S)
        self._first_s = first_s
        self._log = log
        self._interrupt = interrupt
        self._wake = threading.Condition()
        self._sending = threading.Lock()
        self._state = {} if state is None else state
        self._state["fraction"] = 0.0
        self._history: list[dict[str, Any]] = []
        self._seq = 0
        self._dirty = True
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"progress-{job_id}", daemon=True)

    def __enter__(self) -> ProgressReporter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    def update(self, **progress: Any) -> None:
        """Take in what a child or the daemon knows anew; entries of `history` are kept until acknowledged.

        A child that goes on tells again what came before it: an epoch that is told anew takes the place of
        its old entry and of those that followed, as it does at RVM-Server.
        """
        if isinstance(message := progress.get("message"), str):
            progress["message"] = redact(message)
        with self._wake:
            self._history = merged(self._history, progress.pop("history", []))
            self._state.update(progress)
            self._dirty = True
            self._wake.notify()
            if self._log:
                self._log.tell(self._state)

    def take(self, said: Mapping[str, Any]) -> None:
        """Take in what a child says, which may be anything: what does not fit is left out."""
        # A child names no object in storage: the next attempt would fetch it with the worker's own keys.
        known = {key: said[key] for key in said if key in Progress.model_fields and key != "checkpoint"}
        history = known.pop("history", [])
        said_epochs = history if isinstance(history, list) else []
        epochs = [entry for entry in said_epochs if isinstance(entry, dict) and _is_short(entry)]
        with self._wake:
            room = _MAX_EPOCHS - len(self._history)
        self.update(**known, history=epochs[: max(0, room)])

    def confirm(self, phase: str) -> None:
        """Report `phase` and wait for the word to go on; raises when told to end instead, or meanwhile."""
        self.update(phase=phase)
        with contextlib.suppress(RetryStoppedError):
            self._deliver(phase, self._interrupt)
        self._interrupt.check()

    def tell_checkpoint(self, checkpoint: Checkpoint, stop: Interrupt) -> None:
        """Report a stored checkpoint and return when RVM-Server knows it; raises when it does not."""
        self.update(checkpoint=to_wire(checkpoint))
        self._deliver("checkpoint", stop)

    def _deliver(self, what: str, stop: Interrupt) -> None:
        def told(error: Exception, wait_s: float) -> None:
            event(Event.JOB_WAITS, self._job_id).warning(
                "{} waits {:.0f} s: {}; nothing to do unless it stays so", what, wait_s, error
            )
            if isinstance(
                error, _REFUSED
            ):  # perhaps for what a child said: only what must be known is said again
                with self._wake:
                    known = ("phase", "checkpoint")
                    kept: dict[str, Any] = {key: self._state[key] for key in known if key in self._state}
                    self._state.clear()
                    self._state.update(kept)

        self._retry.call(lambda: self._send(stop), stop=stop, on=(*RETRYABLE, *_REFUSED), told=told)

    def _run(self) -> None:
        backoff = self._retry.backoff()
        next_s = time.monotonic() + self._first_s
        while True:
            with self._wake:
                due_s = next_s if self._dirty else next_s + self._keep_alive_s
                while not self._closed and (left_s := due_s - time.monotonic()) > 0:
                    self._wake.wait(left_s)
                    due_s = next_s if self._dirty else due_s
                if self._closed:
                    return
            try:
                self._send()
            except ControllerError as error:
                logger.bind(job_id=self._job_id).debug("progress not delivered: {}", error)
                next_s = time.monotonic() + max(backoff.next_s(error), self._interval_s)
                self._retry.before_retry(error)
            else:
                backoff.reset()
                next_s = time.monotonic() + self._interval_s

    @contextlib.contextmanager
    def _turn(self, stop: Interrupt | None) -> Iterator[None]:
        """One report at a time; who waits for its turn behind one without an answer hears of `stop`."""
        while not self._sending.acquire(timeout=_TURN_LOOK_S):
            if stop:
                stop.check()
        try:
            yield
        finally:
            self._sending.release()

    def _send(self, stop: Interrupt | None = None) -> None:
        with self._turn(stop):
            with self._wake:
                self._seq += 1
                seq, sent = self._seq, self._history[:_EPOCHS_A_REPORT]
                body = {**self._state, "history": sent} if sent else dict(self._state)
                self._dirty = False
            try:
                directive = self._controller.progress(self._job_id, self._lease_token, seq, progress_of(body))
            except FencedError as error:
                if not self._closed:
                    self._interrupt.request(StopReason.FENCED, error.reason)
                return
            except RequestRejectedError:
                with self._wake:
                    self._forget(sent)  # it would be refused again, and hold up what follows
                raise
            except ControllerError:
                with self._wake:
                    self._dirty = True
                raise
            with self._wake:
                self._forget(sent)
                self._dirty = self._dirty or bool(self._history)
            if directive is Directive.CANCEL:
                self._interrupt.request(StopReason.CANCELLED)

    def _forget(self, sent: list[dict[str, Any]]) -> None:
        gone = {id(entry) for entry in sent}
        self._history = [entry for entry in self._history if id(entry) not in gone]


def _is_short(entry: dict[str, Any]) -> bool:
    return len(json.dumps(entry)) <= _MAX_EPOCH_CHARS


def merged(waiting: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the epochs that wait, with `new` ones in the place of those from the same epoch on."""
    epochs = [entry["epoch"] for entry in new if isinstance(entry.get("epoch"), int)]
    if epochs:
        first = min(epochs)
        waiting = [e for e in waiting if not isinstance(e.get("epoch"), int) or e["epoch"] < first]
    return [*waiting, *new]
