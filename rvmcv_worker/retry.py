"""When to try again: back-off, jitter, `Retry-After` and a rejected token, decided here for all.

A failing call is repeated after 1 s, doubling to 60 s, with full jitter, so that many workers do
not come back at once. All of it scales by `[timing] scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import tenacity

from rvmcv_worker.answers import ControllerError, RateLimitedError, ServerUnavailableError, TokenRejectedError
from rvmcv_worker.config import Settings
from rvmcv_worker.events import Event, event
from rvmcv_worker.token_source import TokenSource

#: The first and the longest wait, in seconds, before jitter.
FIRST_S, LONGEST_S = 1.0, 60.0
#: How long a rejected token is waited with, in seconds, before it is read again.
TOKEN_WAIT_S = 60.0
#: How often it is looked whether somebody else has read another token meanwhile, in seconds.
_TOKEN_LOOK_S = 0.5
#: What a repetition may help against.
RETRYABLE: tuple[type[Exception], ...] = (ServerUnavailableError, RateLimitedError, TokenRejectedError)

T = TypeVar("T")


class Stop(Protocol):
    """What ends a wait early: `threading.Event` and `Interrupt` are ones."""

    def wait(self, timeout_s: float, /) -> bool:
        """Wait at most `timeout_s`; True as soon as nothing shall be waited for any more."""


class RetryStoppedError(Exception):
    """Asked to stop while waiting to try again; the cause is what the last try met."""


class Backoff:
    """The waits after one failure after another; `reset` after a success."""

    def __init__(self, settings: Settings, *, first_s: float = FIRST_S, longest_s: float = LONGEST_S) -> None:
        self._settings = settings
        self._wait = tenacity.wait_random_exponential(
            multiplier=settings.scaled(first_s), max=settings.scaled(longest_s)
        )
        self.failures = 0

    def next_s(self, error: BaseException | None = None) -> float:
        """Return how long to wait, in seconds, after one more failure, and what `error` asks for at least."""
        self.failures += 1
        state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = self.failures
        jittered_s = self._wait(state)
        if isinstance(error, TokenRejectedError):
            return self._settings.scaled(TOKEN_WAIT_S)
        if isinstance(error, ControllerError) and error.retry_after_s is not None:
            return max(jittered_s, self._settings.scaled(error.retry_after_s))
        return jittered_s

    def reset(self) -> None:
        """Begin again at the first wait."""
        self.failures = 0


class Retry:
    """Repeats a call until it succeeds, must not be repeated, or nobody waits for it any more."""

    def __init__(self, settings: Settings, token: TokenSource | None = None) -> None:
        """A rejected `token` is read again before each repetition."""
        self._settings = settings
        self._token = token
        #: How long to wait, in seconds, before a rejected token is read again.
        self.token_wait_s = settings.scaled(TOKEN_WAIT_S)

    def backoff(self, *, first_s: float = FIRST_S, longest_s: float = LONGEST_S) -> Backoff:
        """Return a back-off of its own, for a loop that does more than repeat one call."""
        return Backoff(self._settings, first_s=first_s, longest_s=longest_s)

    def delays(self) -> Iterator[float]:
        """Yield the waits of a back-off, in seconds, without end."""
        backoff = self.backoff()
        while True:
            yield backoff.next_s()

    def before_retry(self, error: BaseException) -> None:
        """Do what helps against `error`, after the wait and before the next try."""
        if self._token and isinstance(error, TokenRejectedError):
            reading = self._token.reload()
            if reading.fault:
                event(Event.TOKEN_UNREADABLE).error("{}", reading)

    def pause(self, stop: Stop, seconds: float, error: BaseException | None) -> bool:
        """Wait before the next try; True when `stop` was set.

        With a rejected token the wait ends early as soon as somebody has read another one.
        """
        if self._token is None or not isinstance(error, TokenRejectedError):
            return stop.wait(seconds)
        rejected = self._token.value()
        while seconds > 0 and self._token.value() == rejected:
            if stop.wait(min(seconds, _TOKEN_LOOK_S)):
                return True
            seconds -= _TOKEN_LOOK_S
        return False

    def call(
        self,
        fn: Callable[[], T],
        *,
        stop: Stop,
        give_up_after: int | None = None,
        on: tuple[type[Exception], ...] = RETRYABLE,
        told: Callable[[Exception, float], None] | None = None,
    ) -> T:
        """Return what `fn` returns, repeating it while it raises one of `on`.

        After `give_up_after` tries (None: never) its last exception is raised, at once any other.
        `told` hears of each failure that is followed by a wait, with the wait in seconds. Raises
        `RetryStoppedError` when `stop` is set during a wait.
        """
        backoff = self.backoff()
        last: BaseException | None = None

        def wait_s(state: tenacity.RetryCallState) -> float:
            nonlocal last
            last = state.outcome.exception() if state.outcome else None
            return backoff.next_s(last)

        def sleep(seconds: float) -> None:
            if told and isinstance(last, Exception):
                told(last, seconds)
            if self.pause(stop, seconds, last):
                raise RetryStoppedError("stopped while waiting to try again") from last
            if last:
                self.before_retry(last)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(on),
            wait=wait_s,
            stop=tenacity.stop_never if give_up_after is None else tenacity.stop_after_attempt(give_up_after),
            sleep=sleep,
            reraise=True,
        )
        return retrying(fn)
