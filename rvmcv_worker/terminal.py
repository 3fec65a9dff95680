"""Text for a person at a terminal, names and messages of strangers in it: no markup, nothing that acts."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from rvmcv_worker.logs import escape


def plain(value: object) -> Text:
    """Return `value` as one piece of text, for a cell of a table or a line."""
    return Text(escape(str(value)))


def say(console: Console, text: str) -> None:
    """Print `text` line by line as it is, without wrapping or colours."""
    for line in text.split("\n"):
        console.print(plain(line), highlight=False, soft_wrap=True)
