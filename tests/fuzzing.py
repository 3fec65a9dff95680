"""Rubbish made for whoever reads what others wrote, and a box of time to feed it in."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: How long all targets together are fed, in minutes (`make fuzz MINUTES=`). Without it, one round each,
#: always the same: a test run does not fail for what it has not failed for before.
MINUTES = float(os.environ.get("RVMCV_FUZZ_MINUTES", "0"))
#: What shares that time.
TARGETS = 20
#: Longest that one input may take, in seconds of the processor's time; a slow reader takes far less.
MAX_EXAMPLE_S = 5.0

#: A round of a target; rounds are repeated with other inputs until the time is over.
a_round = settings(
    max_examples=25 if MINUTES else 100,
    derandomize=not MINUTES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class HungError(BaseException):
    """One input took longer than `MAX_EXAMPLE_S`; nothing that is fed may catch it."""


@contextlib.contextmanager
def no_hang(limit_s: float = MAX_EXAMPLE_S) -> Iterator[None]:
    """Raise `HungError` in the main thread when the block computes for longer than `limit_s`."""

    def ring(_signal: int, _frame: object) -> None:
        raise HungError(f"one input took longer than {limit_s} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def feed(target: Callable[[], None]) -> None:
    """Run rounds of a target until its share of the time is over; at least one."""
    until_s = time.monotonic() + MINUTES * 60 / TARGETS
    target()
    while time.monotonic() < until_s:
        target()


# -- values --------------------------------------------------------------------------------------

#: What readers of numbers, names and paths trip over.
_ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    -0.0,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    10**400,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    5e-324,
    "",
    "0",
    "1",
    "../x",
    "..",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "x" * 4096,
    "\uff41\uff11",  # look-alikes of a1
    "\u0661",  # a digit, to some
    "\u202ea",
    "\x1b[31m",
    "\ud800",
    "<b>{{7*7}}</b>",
    "%s%n{0}",
    "s3://a/b",
    "https://127.0.0.1/a",
    "file:///etc/passwd",
    [],
    {},
    [[]],
    {"": None},
    {"__class__": "x"},
]
odd = st.sampled_from(_ODD)
scalars = odd | st.integers() | st.floats() | st.text(max_size=30)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def spoiled(draw: st.DrawFn, good: Any) -> Any:
    """A good JSON value with a few of its parts replaced, left out, renamed or added."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 3))):
        value = _spoil(draw, value)
    return value


def _spoil(draw: st.DrawFn, value: Any) -> Any:
    deeper = isinstance(value, (dict, list)) and value and draw(st.integers(0, 4)) > 0
    if not deeper:
        return draw(values)
    if isinstance(value, list):
        place = draw(st.integers(0, len(value) - 1))
        return [_spoil(draw, item) if index == place else item for index, item in enumerate(value)]
    key = draw(st.sampled_from(sorted(value)))
    what = draw(st.sampled_from(["value", "value", "value", "none", "other key", "one more"]))
    rest = {name: item for name, item in value.items() if name != key}
    if what == "none":
        return rest
    if what == "other key":
        return {**rest, draw(st.text(max_size=8)): value[key]}
    if what == "one more":
        return {**value, draw(st.text(max_size=8)): draw(values)}
    return {**value, key: _spoil(draw, value[key])}


def as_json(value: Any) -> bytes:
    """Write a value as JSON, NaN, Infinity and half surrogates included."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw: st.DrawFn, good: bytes, most: int = 6) -> bytes:
    """Bytes with some of them changed, cut out, repeated or inserted."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, most))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        data = _damage(data, at, draw(st.integers(0, 5)), draw(st.integers(0, 255)))
    return bytes(data)


def damage(data: bytes, dice: random.Random) -> bytes:
    """As `damaged`, by dice."""
    found = bytearray(data)
    for _ in range(dice.randint(1, 6)):
        if found:
            # The beginning is where formats keep what steers their readers.
            end = len(found) if dice.random() < 0.5 else min(len(found), 200)
            found = _damage(found, dice.randrange(end), dice.randint(0, 5), dice.randint(0, 255))
    return bytes(found)


def _damage(data: bytearray, at: int, kind: int, byte: int) -> bytearray:
    if kind == 0:
        data[at] = byte
    elif kind == 1:
        data[at] ^= 1 << (byte % 8)
    elif kind == 2:
        del data[at : at + byte]
    elif kind == 3:
        data[at:at] = data[at : at + byte]
    elif kind == 4:
        data[at : at + 4] = b"\xff\xff\xff\xff" if byte % 2 else b"\0\0\0\0"
    else:
        del data[max(at, 1) :]
    return data


def spoil(value: Any, dice: random.Random) -> Any:
    """As `spoiled`, by dice: one part of a good value is another."""
    if isinstance(value, dict) and value and dice.random() < 0.8:
        key = dice.choice(sorted(value))
        return {**value, key: spoil(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        return [spoil(value[0], dice), *value[1:]]
    return dice.choice(_ODD)
