"""Back-off: bounded, jittered, told what to wait by the server, and ended by a stop."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest

from rvmcv_worker.answers import (
    ControllerError,
    RateLimitedError,
    RequestRejectedError,
    ServerUnavailableError,
    TokenRejectedError,
)
from rvmcv_worker.config import Settings, TimingSettings, WorkerSettings
from rvmcv_worker.errors import FencedError
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.retry import Backoff, Retry, RetryStoppedError, Stop
from rvmcv_worker.token_source import TokenSource

SETTINGS = Settings()
FAST = Settings(timing=TimingSettings(scale=1e-6))


class Noted:
    """A stop that is set after `until` waits, and notes how long each would have been."""

    def __init__(self, until: int | None = None) -> None:
        self.waits_s: list[float] = []
        self._until = until

    def wait(self, timeout_s: float, /) -> bool:
        self.waits_s.append(timeout_s)
        return len(self.waits_s) == self._until


def failing(*errors: Exception) -> list[Exception]:
    return list(errors)


def call(
    errors: list[Exception], stop: Stop, retry: Retry | None = None, give_up_after: int | None = None
) -> str:
    def fn() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    return (retry or Retry(SETTINGS)).call(fn, stop=stop, give_up_after=give_up_after)


def test_waits_double_to_a_minute_with_full_jitter() -> None:
    runs = [list(itertools.islice(Retry(SETTINGS).delays(), 12)) for _ in range(200)]
    for attempt, waits_s in enumerate(zip(*runs, strict=True)):
        longest_s = min(2.0**attempt, 60.0)
        assert 0 <= min(waits_s) < longest_s * 0.1
        assert longest_s * 0.9 < max(waits_s) <= longest_s
    assert next(iter(Retry(FAST).delays())) <= 1e-6


def test_backoff_never_overflows_and_begins_again() -> None:
    backoff = Backoff(SETTINGS)
    assert max(backoff.next_s() for _ in range(2000)) <= 60
    backoff.reset()
    assert backoff.next_s() <= 1


def test_call_is_repeated_until_it_succeeds() -> None:
    stop = Noted()
    errors = failing(ServerUnavailableError("a"), RateLimitedError("b", retry_after_s=42.0))
    assert call(errors, stop) == "done"
    assert len(stop.waits_s) == 2
    assert stop.waits_s[0] <= 1
    assert stop.waits_s[1] == 42


@pytest.mark.parametrize("error", [RequestRejectedError("x"), FencedError("taken"), KeyError("x")])
def test_what_repeating_does_not_help_is_raised_at_once(error: Exception) -> None:
    stop = Noted()
    with pytest.raises(type(error)):
        call(failing(error), stop)
    assert stop.waits_s == []


def test_last_error_is_raised_when_tries_are_used_up() -> None:
    stop = Noted()
    with pytest.raises(ServerUnavailableError, match="third"):
        call(
            failing(*(ServerUnavailableError(n) for n in ("first", "second", "third", "4th"))),
            stop,
            give_up_after=3,
        )
    assert len(stop.waits_s) == 2


def test_stop_ends_the_wait() -> None:
    stopping = threading.Event()
    stopping.set()
    for stop in (stopping, Noted(until=1)):
        with pytest.raises(RetryStoppedError) as caught:
            call(failing(*[ServerUnavailableError("away")] * 5), stop)
        assert isinstance(caught.value.__cause__, ServerUnavailableError)


def test_interrupt_ends_the_wait() -> None:
    interrupt = Interrupt()
    interrupt.request(StopReason.CANCELLED)
    with pytest.raises(RetryStoppedError):
        call(failing(*[ServerUnavailableError("away")] * 5), interrupt)
    interrupt.close()


def test_rejected_token_is_read_again_after_a_minute(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("old")
    settings = Settings(worker=WorkerSettings(runtime_dir=tmp_path, credentials_dir=tmp_path))
    token = TokenSource(settings)
    tried: list[str] = []

    def fn() -> str:
        tried.append(token.value())
        if token.value() == "old":
            (tmp_path / "token").write_text("new")
            raise TokenRejectedError("401")
        return "done"

    stop = Noted()
    assert Retry(settings, token).call(fn, stop=stop) == "done"
    assert (tried, sum(stop.waits_s)) == (["old", "new"], 60.0)
    assert Retry(FAST).token_wait_s == pytest.approx(60e-6)


def test_a_token_that_somebody_else_has_read_ends_the_wait(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("old")
    token = TokenSource(Settings(worker=WorkerSettings(runtime_dir=tmp_path, credentials_dir=tmp_path)))
    retry = Retry(Settings(), token)

    class Reloads(Noted):
        def wait(self, timeout_s: float, /) -> bool:
            if len(self.waits_s) == 3:
                (tmp_path / "token").write_text("new")
                token.reload()
            return super().wait(timeout_s)

    stop = Reloads()
    assert not retry.pause(stop, 60.0, TokenRejectedError("401"))
    assert sum(stop.waits_s) == 2.0
    assert not retry.pause(stop, 7.0, ServerUnavailableError("away"))
    assert stop.waits_s[-1] == 7.0


def test_failures_are_told() -> None:
    told: list[tuple[str, float]] = []
    stop = Noted()
    errors = failing(ServerUnavailableError("one"), ServerUnavailableError("two", retry_after_s=7.0))

    def fn() -> None:
        if errors:
            raise errors.pop(0)

    Retry(SETTINGS).call(fn, stop=stop, told=lambda error, wait_s: told.append((str(error), wait_s)))
    assert told == [("one", stop.waits_s[0]), ("two", 7.0)]


def test_what_is_repeated_can_be_chosen() -> None:
    errors: list[Exception] = [OSError("x")]

    def fn() -> None:
        if errors:
            raise errors.pop()

    Retry(SETTINGS).call(fn, stop=Noted(), on=(OSError,))
    with pytest.raises(ControllerError):
        Retry(SETTINGS).call(
            lambda: call([ServerUnavailableError("x")], Noted(), give_up_after=1), stop=Noted(), on=()
        )
