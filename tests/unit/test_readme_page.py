"""What README.md shows and names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["doctor", "status", "journal"])
def test_each_screen_has_its_place_and_is_there(name: str) -> None:
    (screen,) = re.findall(
        rf"<!-- screen {name} -->\n```\n(.*?)\n```\n<!-- /screen {name} -->", PAGE, re.DOTALL
    )
    command, _, shown = screen.partition("\n")
    assert command.startswith("$ ")
    assert name in command
    assert len(shown.splitlines()) > 5


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", PAGE)
    assert "docs/operations.id.md" in links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_every_target_of_make_is_there() -> None:
    named = set(re.findall(r"^(?:\| `)?make ([a-z0-9-]+)", PAGE, re.MULTILINE))
    assert len(named) > 10
    assert named <= set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
