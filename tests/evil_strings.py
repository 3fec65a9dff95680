"""Text that a stranger may put into a name, an id, a message or a log line, and what it must not do."""

from __future__ import annotations

#: By what each would do where it reached a sink as it is.
EVIL = {
    "new line": "a\n2026-01-09 19:30:00 ERROR forged",
    "carriage return": "a\rforged",
    "next line": "a\x85forged",
    "line separator": "a\u2028forged",
    "paragraph separator": "a\u2029forged",
    "vertical tab and form feed": "a\x0b\x0cforged",
    "journald level": "<0>forged",
    "journald level on a line of its own": "a\n<0>forged",
    "terminal title": "\x1b]0;forged\x07",
    "terminal link": "\x1b]8;;https://evil.example\x1b\\forged\x1b]8;;\x1b\\",
    "terminal colour": "\x1b[31;1mforged\x1b[0m",
    "clear screen": "\x1b[2J\x1b[H",
    "one-byte control sequence": "\x9b31mforged",
    "backspaces": "good\x08\x08\x08\x08evil",
    "null": "a\x00b",
    "right to left": "\u202egnp.exe",
    "isolate": "\u2067evil\u2069",
    "mark": "a\u200e\u200f\u061cb",
    "nothing to see": "a\u200b\u2060\ufeffb",
    "tags": "a\U000e0041b",
    "half a pair": "a\ud800b",
    "rich style": "[bold red]forged[/]",
    "rich link": "[link=https://evil.example]forged[/link]",
    "rich that does not end": "[/bold] [",
    "HTML": "<script>alert(1)</script>",
    "HTML attribute": "\" onmouseover='alert(1)' x=\"",
    "HTML entity": "&lt;b&gt;&#x1b;",
    "template": "{{ 7777*7777 }}{% raw %}",
    "format": "{} {0} {message} %s %n",
    "loguru colour": "<red>forged</red>",
}


def is_one_harmless_line(text: str) -> bool:
    """Whether a terminal and a journal show `text` as what it is: one line, every character of it printed."""
    return text.isprintable() and len(text.splitlines()) <= 1
