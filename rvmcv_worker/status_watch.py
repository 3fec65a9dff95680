"""`status --watch`: the status drawn again and again in its place, until Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.segment import Segment, Segments
from rich.text import Text

from rvmcv_worker import status_text
from rvmcv_worker.control_client import ControlClient, ControlError
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.logs import escape, redact
from rvmcv_worker.status_view import StatusView
from rvmcv_worker.terminal import print_plain

#: What the next look may answer otherwise: the worker is started, stopped, or hangs.
_PASSES = {ExitCode.NOT_RUNNING, ExitCode.TIMED_OUT, ExitCode.FAILED}


class _Sight:
    """What was seen last, and why nothing is seen now."""

    def __init__(self) -> None:
        self.status: dict[str, Any] | None = None
        self.fault: str | None = None
        self._seen_s = 0.0

    def look(self, client: ControlClient) -> None:
        """Ask the worker; raises the `ControlError` that no later look would be without."""
        try:
            self.status = client.status()
        except ControlError as error:
            if error.code not in _PASSES:
                raise
            self.fault = redact(str(error))
        else:
            self.fault, self._seen_s = None, time.monotonic()

    @property
    def lines(self) -> RenderableType:
        """The picture."""
        parts: list[RenderableType] = []
        if self.fault is not None:
            parts.append(Text(escape(self.fault), "bold red"))
            if self.status is not None:
                ago = status_text.duration(time.monotonic() - self._seen_s)
                parts.append(Text(f"what follows is {ago} old; it is asked again and again", "yellow"))
        if self.status is not None:
            parts.append(StatusView(self.status))
        return Group(*parts)


def watch(client: ControlClient, console: Console, every_s: float, *, as_json: bool) -> None:
    """Show the status every so many seconds; returns at Ctrl-C or SIGTERM, raises `ControlError`.

    What is no terminal gets one picture below the other, as JSON one line each.
    """
    sight = _Sight()
    with _until_ended() as wait, contextlib.ExitStack() as stack:
        show = _shown_by(sight, console, every_s, stack, as_json=as_json)
        while True:
            sight.look(client)
            show()
            due_s = time.monotonic() + every_s
            while wait(due_s - time.monotonic()):
                show()  # the window has another size


def _shown_by(
    sight: _Sight, console: Console, every_s: float, stack: contextlib.ExitStack, *, as_json: bool
) -> Callable[[], None]:
    """Return what shows the picture; a screen of the terminal's is kept until the `stack` ends."""
    if as_json:
        return lambda: _print_json(sight)
    if not console.is_terminal or console.is_dumb_terminal:
        return lambda: print_plain(console, Group(Text(time.strftime("%H:%M:%S")), sight.lines))
    live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False, redirect_stderr=False))
    return lambda: live.update(_fitted(sight, console, every_s), refresh=True)


def _print_json(sight: _Sight) -> None:
    body = {"error": sight.fault} if sight.fault is not None else sight.status
    typer.echo(json.dumps(body))


def _fitted(sight: _Sight, console: Console, every_s: float) -> RenderableType:
    """Return the picture cut to the window: what matters least is at its end."""
    lines = console.render_lines(sight.lines, pad=False)
    room = max(2, console.height) - 1
    cut = len(lines) - room
    foot = f"{time.strftime('%H:%M:%S')}, every {every_s:g} s, Ctrl-C ends"
    if cut > 0:
        foot = f"{cut} more lines: a larger window shows them. {foot}"
    segments = [segment for line in lines[:room] for segment in (*line, Segment.line())]
    return Group(Segments(segments), Text(foot, "dim", no_wrap=True, overflow="ellipsis"))


@contextlib.contextmanager
def _until_ended() -> Iterator[Callable[[float], bool]]:
    """Within it Ctrl-C and SIGTERM end the block quietly; gives a wait that a new window size cuts short."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def wait(seconds: float) -> bool:
        return seconds > 0 and signal.sigtimedwait({signal.SIGWINCH}, seconds) is not None

    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield wait
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGWINCH})
