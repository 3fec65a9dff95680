"""A job's way shown while it goes: bars in a terminal, a line for each epoch and phase elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from rvmcv_worker.logs import escape
from rvmcv_worker.terminal import say

#: The phases of a training, in their order, as people would call them.
PHASES = {
    "queued": "waiting for the daemon",
    "download": "fetching the data set",
    "verify": "checking the data set",
    "train": "training",
    "evaluate": "measuring and checking the model",
    "upload": "storing the results",
}


class Watch:
    """Shows one job; a context manager around the time that it runs."""

    def __init__(self, console: Console, epochs: int) -> None:
        self._console = console
        self._epochs = epochs
        self._phase = ""
        self._lines_shown = 0
        self._bars = Progress(
            TextColumn("{task.fields[what]:<8}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
        )
        self._phase_bar = self._bars.add_task("", total=len(PHASES), what="job")
        self._epoch_bar = self._bars.add_task("", total=epochs, what="epochs")

    def __enter__(self) -> Watch:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def show(self, job: dict[str, Any]) -> None:
        """Take in the job as `GET /job/{id}` shows it."""
        progress = job["progress"] or {}
        phase = "queued" if job["status"] == "queued" else progress.get("phase") or "download"
        if self._console.is_terminal:
            self._move_bars(job, progress, phase)
            return
        for entry in job["history"][self._lines_shown :]:
            self._print(f"epoch {entry['epoch']}/{entry['epochs']}  {_figures(entry)}")
        self._lines_shown = len(job["history"])
        if phase != self._phase:
            self._phase = phase
            self._print(PHASES.get(phase, phase))

    def _move_bars(self, job: dict[str, Any], progress: dict[str, Any], phase: str) -> None:
        over = job["finished_at"] is not None
        place = len(PHASES) if job["status"] == "completed" else list(PHASES).index(phase)
        what = job["status"] if over else PHASES[phase]
        self._bars.update(self._phase_bar, completed=place, description=what)
        history = job["history"]
        trained = phase in {"evaluate", "upload"} or job["status"] == "completed"
        fraction = progress.get("fraction") or 0.0
        done = self._epochs * fraction if phase == "train" else float(len(history))
        if trained and history:
            # Fewer than asked for when its patience ended it.
            self._bars.update(self._epoch_bar, total=len(history))
        # What comes before the first epoch may take a while, too.
        told = str(progress.get("message") or "") if phase == "train" else ""
        if history:
            told = f"{len(history)}/{self._epochs}  {_figures(history[-1])}"
        eta_s = progress.get("eta_s")
        if phase == "train" and eta_s is not None:
            told += f"  {eta_s:.0f} s to go"
        self._bars.update(self._epoch_bar, completed=max(done, len(history)), description=escape(told))

    def _print(self, line: str) -> None:
        say(self._console, line)


def _figures(entry: dict[str, Any]) -> str:
    metrics = entry.get("metrics") or {}
    if "miou" in metrics:
        return _figures_of_masks(metrics, entry["losses"])
    parts = [f"mAP50 {metrics['mAP50']:.3f}"] if "mAP50" in metrics else []
    losses = entry.get("losses") or {}
    parts += [f"{name.removesuffix('_loss')} {value:.2f}" for name, value in losses.items()]
    return "  ".join(parts)


def _figures_of_masks(metrics: dict[str, Any], losses: dict[str, Any]) -> str:
    beside = f"base {metrics['base/miou']:.3f}, the box itself {metrics['box_as_mask/miou']:.3f}"
    return f"mIoU {metrics['miou']:.3f} ({beside})  loss {losses['total']:.2f}"
