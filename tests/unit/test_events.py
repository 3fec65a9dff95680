"""Every log call at INFO and above names its event, and every event is explained."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger

import rvmcv_worker
from rvmcv_worker import log_line
from rvmcv_worker.events import Event, event

_PACKAGE = Path(rvmcv_worker.__file__).parent
#: They run elsewhere, or for another program.
_OTHERS = {"compute", "demo", "reference"}
_CALLS = {"info", "success", "warning", "error", "critical", "exception", "log"}
_PAGE = Path(__file__).parents[2] / "docs" / "events.md"
#: Keys of an object of JSON that no detail may take, and what the journal's fields may be called.
_TAKEN = {"time", "level", "message", "exception"}


def _files() -> list[Path]:
    return [
        file for file in sorted(_PACKAGE.rglob("*.py")) if file.relative_to(_PACKAGE).parts[0] not in _OTHERS
    ]


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _root(node: ast.expr, assigned: dict[str, ast.expr]) -> str:
    """Return the name that a chain of calls and attributes begins with, through local names."""
    while True:
        if isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.Attribute):
            node = node.value
        elif isinstance(node, ast.Name) and node.id in assigned:
            node = assigned.pop(node.id)
        else:
            return node.id if isinstance(node, ast.Name) else ""


def _unnamed(source: str) -> list[int]:
    """Return the lines of log calls at INFO and above that name no event."""
    tree = ast.parse(source)
    assigned = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return [
        call.lineno
        for call in _calls(tree)
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in _CALLS
        and _root(call.func.value, dict(assigned)) in {"logger", "log", "logging"}
    ]


def test_each_log_call_at_info_and_above_names_its_event() -> None:
    found = {file.name: lines for file in _files() if (lines := _unnamed(file.read_text()))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "logger.info('x')",
        "logger.bind(job_id=1).opt(depth=1).warning('x')",
        "log = logger.bind(job_id=1)\nlog.log('INFO', 'x')",
        "logging.getLogger('x').error('x')",
    ],
)
def test_a_call_without_an_event_is_found(source: str) -> None:
    assert _unnamed(source)


def test_no_event_is_there_for_nothing() -> None:
    used = {
        node.attr
        for file in _files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Event"
    }
    assert set(Event.__members__) - used == set()


def test_names_are_words_with_dots_and_each_says_when() -> None:
    source = inspect.getsource(Event)
    for each in Event:
        assert re.fullmatch(r"[a-z]+\.[a-z_]+", each.value)
        assert each.name == each.value.replace(".", "_").upper()
        assert re.search(rf"{each.name} = .*  #: \S", source), f"{each.name} says not when"


def test_no_detail_takes_the_place_of_what_each_event_has() -> None:
    details = {
        keyword.arg
        for file in _files()
        for call in _calls(ast.parse(file.read_text()))
        if isinstance(call.func, ast.Name) and call.func.id == "event"
        for keyword in call.keywords
        if keyword.arg
    }
    assert details & {*_TAKEN, "event", "job_id"} == set()
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in details)


def test_the_page_explains_each_event_and_no_other() -> None:
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", _PAGE.read_text(), re.MULTILINE
    )
    assert [name for name, *_ in rows] == [each.value for each in Event]
    levels = {level for _, told, *_ in rows for level in told.split(", ")}
    assert levels <= log_line.LEVELS
    for name, _, when, what_to_do in rows:
        assert when.strip(), name
        assert what_to_do.strip(), name


def test_the_page_gives_the_levels_that_the_calls_have() -> None:
    told = dict(re.findall(r"^\| `([a-z_.]+)` \| ([^|]+) \|", _PAGE.read_text(), re.MULTILINE))
    for name, levels in _levels().items():
        assert set(told[name].split(", ")) >= levels, name


def _levels() -> dict[str, set[str]]:
    """Return at which levels an event is logged, as far as the call itself says it."""
    found: dict[str, set[str]] = {}
    for file in _files():
        for call in _calls(ast.parse(file.read_text())):
            if not isinstance(call.func, ast.Attribute) or call.func.attr not in _CALLS - {"log"}:
                continue
            names = [
                node.attr
                for node in ast.walk(call.func.value)
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "Event"
            ]
            level = {"exception": "ERROR"}.get(call.func.attr, call.func.attr.upper())
            for name in names:
                found.setdefault(Event[name].value, set()).add(level)
    return found


def test_an_event_carries_its_name_its_job_and_its_details() -> None:
    seen = []
    sink = logger.add(lambda message: seen.append(message.record["extra"]), format="{message}")
    event(Event.JOB_CLAIMED, "train_1", attempt=2).info("x")
    event(Event.WORKER_STOPPED).info("x")
    logger.remove(sink)
    assert seen == [
        {"event": "job.claimed", "job_id": "train_1", "details": {"attempt": 2}},
        {"event": "worker.stopped"},
    ]
