"""Many calls on several threads, bounded ahead, their results in the order of what was called with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Calls begun or done and not yet asked for, as a multiple of the threads: one slow call stops the others
#: only after so many.
_AHEAD = 2


def in_order(
    call: Callable[[Item], Result], items: Iterable[Item], *, threads: int
) -> Generator[Result, None, None]:
    """Yield `call(item)` for each item; what a call raises is raised in its place and ends all.

    An end waits for the calls that run, so they must hear of it some other way.
    """
    window: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, "batch-image") as pool:
        try:
            for item in items:
                window.append(pool.submit(call, item))
                while window and (len(window) >= _AHEAD * threads or window[0].done()):
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            for future in window:
                future.cancel()
