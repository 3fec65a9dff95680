"""What a PromQL expression names: metrics, and the labels that it asks them for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_WORDS = frozenset({"sum", "min", "max", "rate", "increase", "histogram_quantile", "time", "absent"})
_WORDS |= {"and", "or", "unless", "by", "on", "group_left"}
_SELECTOR = re.compile(r"\b([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}")
_MATCHER = re.compile(r'\s*([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*')
_GROUPING = re.compile(r"\b(?:by|on|group_left)\s*\(([^)]*)\)")
_NAME = re.compile(r"\b[a-zA-Z_:][a-zA-Z0-9_:]*\b")


@dataclass
class Named:
    """What one expression names."""

    metrics: set[str] = field(default_factory=set)
    #: (metric, label, value); the value is None where it is a pattern.
    matched: set[tuple[str, str, str | None]] = field(default_factory=set)
    grouped: set[str] = field(default_factory=set)


def named_in(expression: str) -> Named:
    """Return what an expression names; raises `ValueError` for a word that it does not understand."""
    found = Named()
    for metric, matchers in _SELECTOR.findall(expression):
        found.metrics.add(metric)
        for matcher in matchers.split(","):
            fits = _MATCHER.fullmatch(matcher)
            if fits is None:
                raise ValueError(f"no matcher: {matcher!r} in {expression}")
            label, how, value = fits.groups()
            found.matched.add((metric, label, None if "~" in how else value))
    rest = _SELECTOR.sub(" ", expression)
    for labels in _GROUPING.findall(rest):
        found.grouped |= {label.strip() for label in labels.split(",") if label.strip()}
    rest = re.sub(r"\[[^\]]*\]", " ", _GROUPING.sub(" ", rest))
    for name in _NAME.findall(rest):
        if name.startswith(("rvmcv_", "node_")):
            found.metrics.add(name)
        elif name not in _WORDS:
            raise ValueError(f"not understood: {name!r} in {expression}")
    return found
