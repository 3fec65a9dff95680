"""A SAM2 training's epochs, as a table and as a picture.

Call `ultralytics_env.isolate` first: it tells matplotlib, imported here, where its cache is.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Metric -> how it is called, its colour. Told apart by people with colour-blindness too (Okabe and Ito).
_METRICS = {
    "miou": ("mIoU, box", "#0072b2"),
    "miou_click": ("mIoU, one click", "#d55e00"),
    "boundary_f": ("boundary F, box", "#009e73"),
}
#: What stands beside the model, by the prefix of its metrics.
_BESIDE = {"base/": ("base model", (0, (5, 2))), "box_as_mask/": ("box as mask", (0, (1, 1.5)))}
_LOSSES = {"total": "#1d2530", "mask": "#0072b2", "dice": "#e69f00", "iou": "#009e73", "object": "#cc79a7"}
#: Largest loss / smallest loss that is shown.
_LOSS_SPAN = 1e4
_FAINT = "#6b7684"
#: Up to so many epochs each has a dot.
_MAX_DOTS = 60


def curves(history: Sequence[dict[str, Any]], path_csv: Path, path_png: Path) -> None:
    """Write both, from what progress tells of each epoch; nothing of a training that has no epoch."""
    if history:
        _write_table(history, path_csv)
        _draw(history, path_png)


def _write_table(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a row for each epoch; what is not known, or not finite, is empty."""
    rows = [_row(entry) for entry in history]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    losses = {f"loss/{name}": value for name, value in entry["losses"].items()}
    numbers = {**losses, "lr": entry["lr"], **entry["metrics"]}
    written = {name: f"{value:.6g}" if _known(value) else "" for name, value in numbers.items()}
    return {"epoch": entry["epoch"], "epoch_s": entry["epoch_s"], **written}


def _draw(history: Sequence[dict[str, Any]], path: Path) -> None:
    # A figure of its own, not pyplot's: no state, no window system.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4, 5))
    _draw_losses(left, history)
    _draw_metrics(right, history)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_losses(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    drawn: list[float] = []
    for name, colour in _LOSSES.items():
        epochs, values = _series(history, "losses", name)
        if any(value > 0 for value in values):
            _line(axes, epochs, values, colour, name, width=2.2 if name == "total" else 1.3)
            drawn += [value for value in values if value > 0]
    if drawn:
        # They are a hundred times apart, and fall as much; what is next to nothing must not squeeze the rest.
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(max(min(drawn), max(drawn) / _LOSS_SPAN) / 1.5, max(drawn) * 1.5)
        _legend(axes)
    axes.set_title("Loss in training", loc="left", fontweight="bold")


def _draw_metrics(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    for name, (label, colour) in _METRICS.items():
        epochs, values = _series(history, "metrics", name)
        if epochs:
            _line(axes, epochs, values, colour, label, width=2.0)
        for prefix, (_, dashes) in _BESIDE.items():
            if beside := _series(history, "metrics", prefix + name)[1]:
                axes.axhline(beside[-1], color=colour, linestyle=dashes, linewidth=1.5)
    for prefix, (label, dashes) in _BESIDE.items():
        if any(key.startswith(prefix) for entry in history for key in entry["metrics"]):
            axes.plot([], [], color=_FAINT, linestyle=dashes, linewidth=1.5, label=label)
    axes.set_title("On the val split", loc="left", fontweight="bold")
    epochs, values = _series(history, "metrics", "miou")
    if epochs:
        best = max(values)
        epoch = epochs[values.index(best)]
        axes.axvline(epoch, color=_FAINT, linewidth=0.8, zorder=0)
        axes.set_title(f"best mIoU {best:.3f}, epoch {epoch}", loc="right", color=_FAINT, fontsize=10)
        _legend(axes)


def _legend(axes: Axes) -> None:
    """Put it below, in one line."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=5,
        frameon=False,
        fontsize=9,
        columnspacing=1.4,
        handlelength=1.8,
        handletextpad=0.5,
    )


def _line(
    axes: Axes, epochs: list[int], values: list[float], colour: str, label: str, *, width: float
) -> None:
    dot = "o" if len(epochs) <= _MAX_DOTS else ""
    axes.plot(epochs, values, color=colour, label=label, linewidth=width, marker=dot, markersize=width * 1.8)


def _series(history: Sequence[dict[str, Any]], group: str, name: str) -> tuple[list[int], list[float]]:
    """Return the epochs that have the number, and the numbers."""
    found = [
        (int(entry["epoch"]), float(entry[group][name]))
        for entry in history
        if _known(entry[group].get(name))
    ]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)
