"""A daemon with a bug, in place of `rvmcv_worker.cli`: FAULT says which, and how often it shows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rvmcv_worker import cli, final_report
from rvmcv_worker.jobs.stub import Stub
from rvmcv_worker.ledger import Ledger


class BugError(Exception):
    """What nobody has thought of."""


def _no_thread() -> Exception:
    return RuntimeError("can't start new thread")


def _hang() -> NoReturn:
    threading.Event().wait()
    raise AssertionError


#: Where each fault shows, what is raised there, and of which calls.
_FAULTS: dict[str, tuple[Any, str, Callable[[], Exception], Callable[..., bool]]] = {
    "no thread": (
        threading.Thread,
        "start",
        _no_thread,
        lambda thread: thread.name.startswith("job-"),
    ),
    "no end": (Stub, "courtesy", BugError, lambda *_: True),
    "no note of the claim": (Ledger, "claimed", BugError, lambda *_: True),
    "disk hangs": (os, "statvfs", _hang, lambda *_: Path(os.environ["HANGS"]).exists()),
    "no settlement": (final_report, "never_ran", BugError, lambda *_: True),
}


def _install(fault: str, times: int) -> None:
    place, name, error, concerns = _FAULTS[fault]
    sound = getattr(place, name)
    shown = 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal shown
        if shown < times and concerns(*args):
            shown += 1
            raise error()
        return sound(*args, **kwargs)

    setattr(place, name, faulty)


if __name__ == "__main__":
    kind, _, often = os.environ["FAULT"].partition(":")
    _install(kind, int(often or 1))
    cli.main()
