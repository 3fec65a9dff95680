"""Figures with the peer that they were measured against, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

LATEST = Path(__file__).parent / "latest.json"


@dataclass(frozen=True)
class Figure:
    """One measured value; `ratio` is value to peer_value where there is a peer."""

    name: str
    value: float
    unit: str
    goal: str = ""
    peer: str | None = None
    peer_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """The value as a multiple of the peer's."""
        return self.value / self.peer_value if self.peer_value else None


def show(title: str, figures: list[Figure]) -> None:
    """Print a table of figures."""
    table = Table(title=title, title_justify="left")
    for column in ("figure", "value", "goal", "peer", "peer's value", "ratio"):
        table.add_column(column, justify="left" if column in {"figure", "goal", "peer"} else "right")
    for figure in figures:
        table.add_row(
            figure.name,
            f"{figure.value:.4g} {figure.unit}",
            figure.goal,
            figure.peer or "",
            "" if figure.peer_value is None else f"{figure.peer_value:.4g} {figure.unit}",
            "" if figure.ratio is None else f"{figure.ratio:.4f}",
        )
    Console().print(table)


def save(figures: list[Figure], file: Path = LATEST) -> None:
    """Put figures into `latest.json`, beside those of other benchmarks that lie there."""
    known = json.loads(file.read_text()) if file.exists() else {}
    for figure in figures:
        entry = asdict(figure)
        known[entry.pop("name")] = {
            **{key: entry[key] for key in ("value", "unit", "peer", "peer_value")},
            "ratio": figure.ratio,
        }
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
