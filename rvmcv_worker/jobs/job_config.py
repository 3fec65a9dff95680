"""How a job's config is read: values that several job types know, and how a wrong key is explained."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

Fraction = Annotated[float, Field(ge=0, le=1)]
#: A data set's class name: what a person can read, and no more.
ClassName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]

#: Mistakes of a config that its error names.
_MOST_EXPLAINED = 20


def unknown(key: str, known: Collection[str]) -> str:
    """Say that there is no such key, and which known one is like it."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"config.{key[:64]}: no such option{hint}"


def explain(error: ValidationError, config: Mapping[str, Any]) -> list[str]:
    """Say of each wrong key, up to `_MOST_EXPLAINED`, what is wrong with it, and what it is."""
    said = []
    for item in error.errors(include_url=False, include_context=False)[:_MOST_EXPLAINED]:
        key = ".".join(str(part)[:64] for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        shown = f" (it is {str(config[key])[:60]!r})" if key in config else ""
        said.append(f"config.{key}: {text}{shown}" if key else f"config: {text}")
    return list(dict.fromkeys(said))
