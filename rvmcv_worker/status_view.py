"""How the worker is, drawn for a terminal of any width: what matters most comes first.

Ids, messages and sentences of strangers are in a status: each piece of it becomes text that has no markup and
nothing that acts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rvmcv_worker import status_text
from rvmcv_worker.logs import escape

#: From so many columns on there is room for tables; with fewer, one thing stands below the other.
_NARROW = 60
#: From so many columns on the job's type has a column too: mostly its id says it.
_WIDE = 100
_STATE_STYLES = {
    "ready": "bold green",
    "busy": "bold green",
    "paused": "bold yellow",
    "draining": "bold yellow",
    "degraded": "bold red",
}
_END_STYLES = {"completed": "green", "failed": "red", "fenced": "yellow", "queued": "yellow"}
#: Columns that the last ends need for all but the job's id.
_ENDS_COLUMNS = 42
#: A GPU at so many °C is warm, and hot.
_WARM_C, _HOT_C = 80, 88


class StatusView:
    """A status as something to print."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*_parts(self._status, _Canvas(options.max_width, ascii_only=options.ascii_only)))


class _Canvas:
    """What there is room for, and the characters for bars."""

    def __init__(self, width: int, *, ascii_only: bool) -> None:
        self.width = width
        self.is_narrow = width < _NARROW
        self.is_wide = width >= _WIDE
        self._full, self._empty = ("#", "-") if ascii_only else ("█", "░")

    def bar(self, fraction: float, width: int, style: str) -> Text:
        filled = round(max(0.0, min(1.0, fraction)) * width)
        return Text.assemble((self._full * filled, style), (self._empty * (width - filled), "dim"))


def _parts(status: dict[str, Any], canvas: _Canvas) -> Iterator[RenderableType]:
    yield from _head(status)
    yield from _running(status["running"], canvas)
    yield from _gpus(status, canvas)
    yield from _rest(status)
    yield from _ends(status["last_ends"], canvas)


def _head(status: dict[str, Any]) -> Iterator[RenderableType]:
    state = status["state"]
    stopping = ", stopping" if status["stopping"] else ""
    yield Text.assemble(
        (escape(status["worker_id"]), "bold"),
        " is ",
        (escape(f"{state}{stopping}"), _STATE_STYLES.get(state, "bold")),
        (
            escape(f"  rvmcv-worker {status['version']}, up {status_text.duration(status['uptime_s'])}"),
            "dim",
        ),
    )
    for reason in status["reasons"]:
        yield _item(reason, "red" if state == "degraded" else "yellow")
    if wish := status_text.wish(status["desired"]):
        yield _item(wish, "yellow")
    claims = ", ".join(lane for lane, claiming in status["claims"].items() if claiming)
    yield _labelled("claims", claims or "nothing", "" if claims else "yellow")


def _running(jobs: list[dict[str, Any]], canvas: _Canvas) -> Iterator[RenderableType]:
    yield _title(f"Running: {len(jobs) or 'no job'}")
    for job in jobs:
        about = f"{job['job_type']}, attempt {job['attempt']}, since {status_text.duration(job['running_s'])}"
        yield Text.assemble(
            (escape(str(job["job_id"])), "bold"), "  ", (escape(about), "dim"), overflow="fold"
        )
        how = _text(status_text.progress(job), "yellow" if job["ending"] else "")
        if job["fraction"] is not None:
            bar = canvas.bar(job["fraction"], max(10, min(40, canvas.width // 3)), "green")
            percent = Text(f" {100 * job['fraction']:3.0f} %  ")
            how = bar + percent + how if not canvas.is_narrow else Text("\n").join([bar + percent, how])
        yield _indented(how)
        if job["message"]:
            yield _indented(_text(job["message"], "dim"))


def _gpus(status: dict[str, Any], canvas: _Canvas) -> Iterator[RenderableType]:
    if status["no_gpus"]:
        yield _title("GPUs: none")
        yield _indented(_text(status["no_gpus"]))
        return
    yield _title("GPUs")
    for gpu in status["gpus"]:
        yield from _gpu(gpu, canvas)


def _gpu(gpu: dict[str, Any], canvas: _Canvas) -> Iterator[RenderableType]:
    name = Text.assemble((f"{int(gpu['index'])} ", "bold"), escape(str(gpu["name"])))
    if gpu["memory_used_mb"] is None:
        yield name + Text("  does not answer", "red")
        return
    width = max(8, min(24, (canvas.width - 64) // 2))
    used, total = gpu["memory_used_mb"] / 1024, gpu["memory_total_mb"] / 1024
    bars = [
        _figure(canvas, "use", gpu["utilization_pct"], 100, width, "cyan", "{:3.0f} %"),
        _figure(canvas, "memory", used, total, width, "magenta", f"{{:.1f}} of {total:.1f} GB"),
        _figure(canvas, "heat", gpu["temperature_c"], 100, 5, _heat(gpu["temperature_c"]), "{:.0f} °C"),
        Text("? W" if gpu["power_w"] is None else f"{gpu['power_w']:.0f} W"),
    ]
    yield name
    yield _indented(Text("\n" if canvas.is_narrow else "  ").join(bars))


def _figure(
    canvas: _Canvas, name: str, value: float | None, top: float, width: int, style: str, form: str
) -> Text:
    if value is None:
        return Text(f"{name} ?")
    return Text(f"{name} ") + canvas.bar(value / top if top else 0.0, width, style) + f" {form.format(value)}"


def _heat(celsius: float | None) -> str:
    if celsius is None or celsius < _WARM_C:
        return "green"
    return "yellow" if celsius < _HOT_C else "red"


def _rest(status: dict[str, Any]) -> Iterator[RenderableType]:
    yield Text()
    disk = status["disk"]
    yield _labelled("disk", status_text.disk(disk), "red" if status_text.disk_is_short(disk) else "")
    yield _labelled("outbox", status_text.outbox(status), "" if status["outbox"] == 0 else "yellow")
    for engine in status["engines"]:
        yield _labelled("engine", status_text.engine(engine))
    yield _labelled("server", status["server"])
    yield _labelled("wall", status["sandbox"])


def _ends(ends: list[dict[str, Any]], canvas: _Canvas) -> Iterator[RenderableType]:
    yield _title("Last ends" if ends else "Last ends: none since the start")
    if not ends:
        return
    # An id is there to be copied: where it would have to be broken, each end has two lines.
    if max(cell_len(escape(end["job_id"])) for end in ends) > canvas.width - _ENDS_COLUMNS:
        for end in ends:
            yield _text(end["job_id"])
            error = f" {end['error_code']}" if end["error_code"] else ""
            took, ago = status_text.brief(end["took_s"]), status_text.brief(end["ended_ago_s"])
            how = _text(f"{status_text.ended_as(end)}{error}", _END_STYLES.get(end["status"], ""))
            yield _indented(how + _text(f", took {took}, {ago} ago", "dim"))
        return
    table = Table(box=None, padding=(0, 2 if canvas.is_wide else 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("ago", justify="right", no_wrap=True)
    table.add_column("ended as", no_wrap=True)
    table.add_column("job", no_wrap=True)
    if canvas.is_wide:
        table.add_column("type", overflow="fold")
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("error", overflow="fold")
    for end in ends:
        table.add_row(
            Text(status_text.brief(end["ended_ago_s"])),
            _text(status_text.ended_as(end), _END_STYLES.get(end["status"], "")),
            _text(end["job_id"]),
            *([_text(end["job_type"])] if canvas.is_wide else []),
            Text(status_text.brief(end["took_s"])),
            _text(end["error_code"] or "", "red"),
        )
    yield table


def _title(text: str) -> Text:
    return Text(f"\n{text}", "bold underline")


def _labelled(name: str, what: str, style: str = "") -> RenderableType:
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_column(width=7, no_wrap=True, style="dim")
    row.add_column(overflow="fold")
    row.add_row(name, _text(what, style))
    return row


def _item(sentence: str, style: str) -> RenderableType:
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_column(width=1, style=style)
    row.add_column(overflow="fold")
    row.add_row("!", _text(sentence, style))
    return row


def _indented(text: Text) -> RenderableType:
    return Padding(text, (0, 0, 0, 2), expand=False)


def _text(value: object, style: str = "") -> Text:
    return Text(escape(str(value)), style, overflow="fold")
