"""How good the masks of a fine-tuned SAM2 are, beside those of its base model and the box itself."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from rvmcv_worker.terminal import plain, say

_MEASURES = {"miou": "mIoU, boxes", "miou_click": "mIoU, a click", "boundary_f": "boundary F"}


def print_masks(console: Console, metrics: dict[str, Any]) -> None:
    """Print the figures of val and test, and what they mean in a sentence."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("split", no_wrap=True)
    table.add_column("masks by", overflow="fold")
    for name in ("objects", *_MEASURES.values()):
        table.add_column(name, justify="right", no_wrap=True)
    for split, measured in (("val", metrics), ("test", metrics.get("test"))):
        if not measured:
            continue
        table.add_row(split, "the fine-tuned model", *_cells(measured), style="bold")
        for name, of_class in measured["per_class"].items():
            table.add_row(split, plain(f"  of {name}"), *_cells(of_class))
        table.add_row(split, "its base model", *_cells(measured["base"]))
        if box := measured.get("box_as_mask"):
            table.add_row(split, "the box itself", *_cells(box))
    console.print()
    console.print(table)
    say(console, f"\nVerdict: {metrics['verdict']}.")


def _cells(figures: dict[str, Any]) -> list[str]:
    values = [figures[name] for name in _MEASURES]
    return [str(figures["instances"]), *("-" if value is None else f"{value:.3f}" for value in values)]
