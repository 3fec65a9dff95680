"""Text that strangers wrote, made fit for messages, logs and pages."""

from __future__ import annotations


def printable(text: str, max_chars: int = 200) -> str:
    """Return `text` on one line, hidden characters escaped, the middle cut out when it is long.

    Hidden is what acts on a terminal or shows nothing: controls, bidi marks, lone surrogates, odd blanks.
    """
    if len(text) > max_chars:
        half = (max_chars - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
