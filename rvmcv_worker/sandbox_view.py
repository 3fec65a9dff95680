"""`rvmcv-worker doctor --sandbox`: what a job on this machine can see and do, asked from inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rvmcv_worker import launch, sandbox
from rvmcv_worker.config import Settings
from rvmcv_worker.logs import escape

_GB = 1e9
#: How many of a long list a person is shown.
_SHOWN = 12


class SandboxViewError(Exception):
    """Nothing could be started in a job's place; the message says why."""


def look(settings: Settings) -> dict[str, Any]:
    """Start a probe as jobs are started and return what it found; raises `SandboxViewError`.

    Besides its findings (`compute/look_around.py`) there are `wall`, and `open`: what is missing of one.
    """
    try:
        wall = sandbox.choose(settings.sandbox, hide=settings.secret_dirs)
    except sandbox.SandboxUnavailableError as error:
        raise SandboxViewError(f"no wall, no jobs: {error}") from error
    argv = (*launch.PYTHON, "-m", "rvmcv_worker.compute.look_around")
    trial = sandbox.try_out(wall, argv, limits=settings.limits)
    if trial.error:
        raise SandboxViewError(f"the probe failed: {trial.error}")
    return {"wall": wall.name, "open": wall.shortcoming, **json.loads(trial.output)}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield what was found, for a person."""
    for name, text in _rows(found):
        yield f"{name:<12}{escape(text)}"


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    user = found["user"]
    yield "wall", found["wall"] if not found["open"] else f"{found['wall']} (plain processes)"
    if found["open"]:
        yield "open", found["open"]
    held = "no capabilities" if not int(user["capabilities"], 16) else f"capabilities {user['capabilities']}"
    gains = "gains none by setuid" if user["no_new_privileges"] else "may gain more by setuid"
    filtered = "system calls filtered" if user["seccomp_filters"] else "no filter of system calls"
    yield "user", f"uid {user['uid']}, gid {user['gid']}, {held}, {gains}, {filtered}"
    yield "processes", _some(found["processes"])
    for place, names in found["files"].items():
        if names is not None:
            yield "files", f"{place}: {_some(names)}"
    for place in found["writable"]:
        yield "writable", f"{place['path']}: {place['free_bytes'] / _GB:.1f} GB free"
    yield "network", f"interfaces {_some(found['network']['interfaces'])}"
    yield from _by_answer("sockets", found["network"]["sockets"])
    yield "devices", _some(found["devices"])
    yield from _by_answer("calls", found["calls"])
    limits = found["limits"].items()
    yield "limits", ", ".join(f"{name} {'none' if value is None else value}" for name, value in limits)
    yield "memory", f"oom_score_adj {found['oom_score_adj']}: 1000 is taken first when memory runs out"
    yield "environment", _some(found["environment"])


def _by_answer(name: str, answers: dict[str, str]) -> Iterator[tuple[str, str]]:
    for answer in sorted(set(answers.values())):
        yield name, f"{answer}: {', '.join(asked for asked, said in answers.items() if said == answer)}"


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
