"""Text for a person at a terminal, names and messages of strangers in it: no markup, nothing that acts."""

from __future__ import annotations

import io
import os
import sys

from rich.console import Console, RenderableType
from rich.text import Text

from rvmcv_worker.logs import escape

#: What reads a pipe has no width of its own.
_PIPE_COLUMNS = 120


def console() -> Console:
    """Return a console for standard output: wide where that is no terminal; plain there, and by NO_COLOR."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale without ° and bars ends no command
    if sys.stdout.isatty():
        return Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdigit() and int(columns) else _PIPE_COLUMNS
    return Console(width=width, highlight=False)


def plain(value: object) -> Text:
    """Return `value` as one piece of text, for a cell of a table or a line."""
    return Text(escape(str(value)))


def say(console: Console, text: str) -> None:
    """Print `text` line by line as it is, without wrapping or colours."""
    for line in text.split("\n"):
        console.print(plain(line), highlight=False, soft_wrap=True)


def print_plain(console: Console, what: RenderableType) -> None:
    """Print something drawn; where it is no terminal that shows it, without blanks at the ends of lines."""
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as capture:
        console.print(what)
    for line in capture.get().splitlines():
        console.print(Text(line.rstrip()), soft_wrap=True)
