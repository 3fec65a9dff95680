"""`docs/security.md` names a test for each threat: every one of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("## Threats, defences, tests")[1].split("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith(("| threat", "| ---"))
]


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:60] for row in ROWS])
def test_every_test_that_a_threat_names_is_there(row: list[str]) -> None:
    _threat, _defence, shown = row
    named = re.findall(r"`([^`]+)`", shown)
    assert named
    for each in named:
        file, _, function = each.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in found if function else any(name.startswith("test_") for name in found), each


def test_the_page_has_its_table() -> None:
    assert len(ROWS) > 20
    files = {file.name for file in (TESTS / "security").glob("test_*.py")}
    assert {name for name in files if f"security/{name}" not in PAGE} == set(), "each is named"
