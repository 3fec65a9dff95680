"""How a status looks: at every width, without colours, in a small window."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rvmcv_worker import status_text
from rvmcv_worker.control_client import ControlClient, ControlError
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.status_view import StatusView
from rvmcv_worker.status_watch import _fitted, _Sight

JOB: dict[str, Any] = {
    "job_id": "train_yolo11_20260109_193000_7f3k",
    "job_type": "yolo11",
    "attempt": 2,
    "running_s": 3800.0,
    "ending": None,
    "phase": "train",
    "fraction": 0.48,
    "epoch": 48,
    "epochs": 100,
    "images_done": None,
    "images_total": None,
    "eta_s": 3900.0,
    "message": None,
}
GPU = {
    "index": 0,
    "name": "NVIDIA GeForce RTX 4090",
    "utilization_pct": 97.0,
    "memory_used_mb": 18000,
    "memory_total_mb": 24564,
    "temperature_c": 71,
    "power_w": 402.5,
}
STATUS: dict[str, Any] = {
    "worker_id": "vm102",
    "version": "1.0.0",
    "state": "degraded",
    "reasons": ["the token is rejected: put a new one into its file, then reload"],
    "claims": {"train": True, "infer": True, "batch": False},
    "desired": {"server": "drain", "operator": "pause", "holds": "drain"},
    "stopping": False,
    "uptime_s": 81234,
    "server": "https://rvm.example",
    "sandbox": "bubblewrap",
    "engines": [],
    "running": [JOB],
    "claiming": 0,
    "outbox": 2,
    "gpus": [GPU, {**GPU, "index": 1, "memory_used_mb": None}],
    "no_gpus": None,
    "disk": {
        "free_gb": 310.2,
        "floor_gb": 20.0,
        "workspace_gb": 4.1,
        "model_store_gb": 3.21,
        "looked_ago_s": 0.4,
    },
    "last_ends": [
        {
            "job_id": "train_yolo11_20260108_070000_aaaa",
            "job_type": "yolo11",
            "status": "failed",
            "error_code": "dataset_unavailable",
            "took_s": 12.3,
            "ended_ago_s": 310.0,
        },
        {
            "job_id": "infer_01J",
            "job_type": "inference",
            "status": "queued",
            "error_code": "worker_stopped",
            "took_s": 0.2,
            "ended_ago_s": 8000.0,
        },
    ],
}
#: What nobody may miss, whatever the terminal.
MATTERS = (
    "vm102 is degraded",
    "token is rejected",
    "rvmcv-worker resume",
    JOB["job_id"],
    "48 %",
    "epoch 48/100",
    "1 h 5 min to go",
    "97 %",
    "17.6 of 24.0 GB",
    "71 °C",
    "402 W",
    "does not answer",
    "310 GB free",
    "floor 20 GB",
    "2 final reports wait",
    "train_yolo11_20260108_070000_aaaa",
    "failed",
    "dataset_unavailable",
    "handed back",
)


def _drawn(status: dict[str, Any], width: int, **more: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, **more).print(StatusView(status))
    return stream.getvalue()


def _without_breaks(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", [30, 40, 59, 60, 79, 80, 99, 100, 120, 250])
def test_no_width_loses_what_matters_or_is_exceeded(width: int) -> None:
    drawn = _drawn(STATUS, width)
    assert max(map(len, drawn.splitlines())) <= width
    flat = _without_breaks(drawn)
    missing = [said for said in MATTERS if _without_breaks(said) not in flat]
    assert missing == []


def test_at_80_columns_a_job_a_gpu_and_an_end_have_a_line_each() -> None:
    lines = [line.rstrip() for line in _drawn(STATUS, 80).splitlines()]
    assert [line for line in lines if " 48 %  train, epoch 48/100, 1 h 5 min to go" in line]
    assert [line for line in lines if line.endswith("heat ████░ 71 °C  402 W")]
    assert [line for line in lines if "train_yolo11_20260108_070000_aaaa  12 s dataset_unavailable" in line]


def test_a_state_is_told_by_word_and_by_colour() -> None:
    assert "\x1b[1;31mdegraded\x1b[0m" in _drawn(STATUS, 80, force_terminal=True, color_system="standard")
    assert "\x1b" not in _drawn(STATUS, 80, force_terminal=True, color_system=None)
    assert "\x1b" not in _drawn(STATUS, 80)


def test_without_unicode_bars_are_of_ascii() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    Console(file=stream, width=80).print(StatusView(STATUS))
    stream.flush()
    drawn = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "use ########" in drawn
    assert "memory ######--" in drawn


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    drawn = _drawn({**STATUS, "claiming": None, "outbox": None}, 120)
    assert "the ledger does not answer" in drawn
    disk = {**STATUS["disk"], "looked_ago_s": 75.0}
    assert "as of 1 min 15 s ago: the disk does not answer since" in _drawn({**STATUS, "disk": disk}, 200)
    assert "cannot be asked" in _drawn({**STATUS, "disk": {**disk, "free_gb": None}}, 120)
    assert "GPUs: none" in _drawn({**STATUS, "gpus": [], "no_gpus": "no NVIDIA driver"}, 120)


def test_a_wish_says_whose_it_is_and_what_takes_it_back() -> None:
    assert status_text.wish({"server": "run", "operator": "run"}) is None
    said = status_text.wish({"server": "drain", "operator": "pause"})
    assert said == (
        "Pause: the operator's wish: `rvmcv-worker resume` takes it back; "
        "drain: RVM-Server's wish: an admin takes it back there"
    )


class _Silent(ControlClient):
    """A worker of which nothing can be learned."""

    def __init__(self, code: ExitCode) -> None:
        self._code = code

    def status(self) -> dict[str, Any]:
        raise ControlError("it does not run", self._code)


@pytest.mark.parametrize("rows", [3, 10, 24, 100])
def test_a_picture_fits_its_window_and_says_what_is_cut(rows: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, height=rows, force_terminal=True, color_system=None)
    sight = _Sight()
    sight.status = STATUS
    console.print(_fitted(sight, console, 2.0))
    lines = stream.getvalue().splitlines()
    assert len(lines) <= rows
    assert lines[0].startswith("vm102 is degraded")
    assert ("more lines: a larger window shows them" in lines[-1]) == (rows < 30)
    with pytest.raises(ControlError):
        sight.look(_Silent(ExitCode.NOT_ALLOWED))  # no later look would be without it
    sight.look(_Silent(ExitCode.NOT_RUNNING))
    stream.truncate(0)
    console.print(_fitted(sight, console, 2.0))
    assert "it does not run" in stream.getvalue()
    assert ("vm102 is degraded" in stream.getvalue()) == (rows > 3)
