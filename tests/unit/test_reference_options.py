"""Options as they are typed at the reference server's command line."""

from __future__ import annotations

from typing import Any

import pytest

from rvmcv_worker.reference.cli_common import option_of


@pytest.mark.parametrize(
    ("typed", "option"),
    [
        ("train=decoder+neck", ("train", "decoder+neck")),
        ("patience=0", ("patience", 0)),
        ('names=["a", "b"]', ("names", ["a", "b"])),
        ("lr0=NaN", ("lr0", "NaN")),
        ("lr0=-Infinity", ("lr0", "-Infinity")),
    ],
)
def test_a_value_is_json_or_text(typed: str, option: tuple[str, Any]) -> None:
    assert option_of(typed) == option
