"""docs/architecture.md says of each file what it is, once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import rvmcv_worker

_PACKAGE = Path(rvmcv_worker.__file__).parent
_PAGE = (Path(__file__).parents[2] / "docs/architecture.md").read_text()


def _files(folder: str) -> Counter[str]:
    return Counter(file.name for file in (_PACKAGE / folder).glob("*.py") if file.name != "__init__.py")


def _named(text: str) -> Counter[str]:
    return Counter(re.findall(r"`(\w+\.py)`", text))


def test_every_file_behind_the_wall_has_one_place_in_the_table() -> None:
    _, table = _PAGE.split("`compute/` runs behind the wall.")
    rows = re.findall(r"^\| (.+?) \|", table.partition("`reference/` is")[0], re.MULTILINE)
    assert _named("\n".join(rows)) == _files("compute")


def test_every_file_of_a_job_type_is_named_once() -> None:
    (row,) = re.findall(r"^\| `jobs/` \| .+$", _PAGE, re.MULTILINE)
    assert _named(row) == _files("jobs")
