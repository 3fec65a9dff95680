"""Text from outside is shown as what it is, wherever it is shown: log, journal, terminal, page."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import requests
from loguru import logger
from rich.console import Console

from rvmcv_worker import doctor, log_line, log_output, logs
from rvmcv_worker.answers import excerpt
from rvmcv_worker.child_log import ChildLog
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.config import Settings
from rvmcv_worker.demo.report import print_facts
from rvmcv_worker.events import Event, event
from rvmcv_worker.job_log_text import drawn as job_line
from rvmcv_worker.job_logs import JobLogs
from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.state import Lane
from rvmcv_worker.status_view import StatusView
from rvmcv_worker.terminal import print_plain
from rvmcv_worker.urls import shown
from tests.evil_strings import EVIL, is_one_harmless_line
from tests.fault_stage import open_stage
from tests.journal_socket import JournalSocket, under_systemd
from tests.network_faults import Answer
from tests.reference_talker import Talker

evil_texts = pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())


def _tell(evil: str) -> None:
    """Put `evil` wherever an event has room for it, three times."""
    event(Event.JOB_FAILED, evil, error_code=evil).warning("the server said {}", evil)
    logger.bind(job_id=evil).warning(f"{evil}")
    try:
        raise ValueError(evil)
    except ValueError:
        event(Event.WORKER_FAULT).exception("{}", evil)


@contextlib.contextmanager
def _as_service(
    monkeypatch: pytest.MonkeyPatch, directory: Path, log_format: Literal["text", "json"]
) -> Iterator[Path]:
    """The daemon's own output as under systemd; yields the file that is standard error."""
    with under_systemd(monkeypatch, directory, directory / "socket") as stream:
        log_output.configure("DEBUG", log_format)
        try:
            yield Path(stream.name)
        finally:
            logger.remove()


def _log_lines(tell: Callable[[], None], log_format: Literal["text", "json"] = "text") -> list[str]:
    """Return what is written while the daemon's own output is set up, line by line."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stderr(stream):
        log_output.configure("DEBUG", log_format)
        tell()
        logger.remove()
    stream.flush()
    return stream.buffer.getvalue().decode().removesuffix("\n").split("\n")


@evil_texts
def test_nothing_forges_a_log_line(evil: str) -> None:
    lines = _log_lines(lambda: _tell(evil))
    assert all(map(is_one_harmless_line, lines))
    assert sum(bool(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (WARNING|ERROR)", line)) for line in lines) == 3
    assert not [line for line in lines if not re.match(r"\d{4}-|  ", line)]


@evil_texts
def test_nothing_forges_an_object_of_the_log(evil: str) -> None:
    lines = _log_lines(lambda: _tell(evil), "json")
    assert len(lines) == 3
    assert all(map(is_one_harmless_line, lines))
    for said in map(json.loads, lines):
        assert all(is_one_harmless_line(line) for value in said.values() for line in str(value).split("\n"))
        assert set(said) <= {"time", "level", "event", "job_id", "message", "error_code", "exception"}


@evil_texts
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_forges_a_line_on_the_way_round_a_journal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, evil: str, log_format: Literal["text", "json"]
) -> None:
    with _as_service(monkeypatch, tmp_path, log_format) as stderr:
        _tell(evil)
        lines = stderr.read_bytes().decode().removesuffix("\n").split("\n")
    assert all(map(is_one_harmless_line, lines))
    assert {line[:3] for line in lines} <= {"<4>", "<3>"}
    assert [line[:3] for line in lines].count("<4>") == 2


@evil_texts
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_forges_a_field_or_a_line_of_a_journal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, evil: str, log_format: Literal["text", "json"]
) -> None:
    with (
        JournalSocket(tmp_path / "socket") as journal,
        _as_service(monkeypatch, tmp_path, log_format) as stderr,
    ):
        _tell(evil)
        entries = journal.entries()
        assert stderr.read_bytes() == b""
    assert [entry["PRIORITY"] for entry in entries] == ["4", "4", "3"]
    for entry in entries:
        own = {"RVMCV_EVENT", "RVMCV_JOB_ID", "RVMCV_ERROR_CODE"}
        assert set(entry) - own == {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER"}
        assert all(is_one_harmless_line(value) for name, value in entry.items() if name != "MESSAGE")
        first, *trace = entry["MESSAGE"].split("\n")
        assert all(map(is_one_harmless_line, (first, *trace)))
        assert all(line.startswith("  ") for line in trace)


def test_what_goes_round_the_log_forges_a_line_where_it_is_not_escaped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(log_line, "escape", lambda text: text)
    with _as_service(monkeypatch, tmp_path, "text") as stderr:
        logger.warning("the server said {}", EVIL["journald level on a line of its own"])
        lines = stderr.read_text().splitlines()
    assert lines[1].startswith("<0>"), "the attack works without the defence"


@evil_texts
def test_nothing_forges_a_line_of_a_childs_log(tmp_path: Path, evil: str) -> None:
    heard: list[str] = []
    log = ChildLog(tmp_path / "train.log", 100_000, heard.append)
    log.feed(f"{evil}\n".encode("utf-8", "surrogatepass"))
    log.close()
    written = (tmp_path / "train.log").read_text().removesuffix("\n").split("\n")
    assert written == heard
    assert all(map(is_one_harmless_line, written))


@evil_texts
@pytest.mark.parametrize(
    "fit",
    [logs.escape, printable, shown, lambda text: excerpt(text.encode("utf-8", "surrogatepass"))],
    ids=["log", "compute", "URL", "answer"],
)
def test_what_makes_text_fit_for_messages_makes_it_harmless(fit: Any, evil: str) -> None:
    assert is_one_harmless_line(fit(evil))


def _status(evil: str) -> dict[str, Any]:
    job = {"job_id": evil, "job_type": evil, "attempt": 1, "phase": evil, "fraction": 0.5, "epoch": None}
    job |= {"images_done": None, "eta_s": None, "ending": evil, "message": evil, "running_s": 1.0}
    end = {
        "job_id": evil,
        "job_type": evil,
        "error_code": evil,
        "status": evil,
        "took_s": 1,
        "ended_ago_s": 1,
    }
    engine = {"state": evil, "device": evil, "in_flight": 0, "answered": 1, "replaced": 0, "memory_mb": 0}
    return {
        "worker_id": evil,
        "state": evil,
        "stopping": False,
        "version": evil,
        "uptime_s": 1,
        "sandbox": evil,
        "server": evil,
        "desired": {"server": evil, "operator": evil},
        "claims": {evil: True},
        "reasons": [evil],
        "engines": [{**engine, "trust": evil}],
        "running": [job],
        "claiming": 0,
        "outbox": 0,
        "gpus": [
            {
                "index": 0,
                "name": evil,
                "utilization_pct": 1.0,
                "memory_used_mb": 1,
                "memory_total_mb": 2,
                "temperature_c": 50,
                "power_w": None,
            }
        ],
        "no_gpus": None,
        "disk": {
            "free_gb": 1.0,
            "floor_gb": 2.0,
            "workspace_gb": 0.0,
            "model_store_gb": None,
            "looked_ago_s": 0.1,
        },
        "last_ends": [end],
    }


@evil_texts
def test_nothing_forges_a_line_of_the_status(evil: str) -> None:
    lines = _printed(lambda console: print_plain(console, StatusView(_status(evil)))).split("\n")
    assert len(lines) == len(
        _printed(lambda console: print_plain(console, StatusView(_status("x")))).split("\n")
    )
    assert all(map(is_one_harmless_line, lines))
    for width in (20, 60, 120):
        with io.StringIO() as stream:
            Console(file=stream, width=width, color_system="truecolor", force_terminal=True).print(
                StatusView(_status(evil))
            )
            # What acts is of the drawing alone: letters and colours of its own.
            drawn = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
        assert all(map(is_one_harmless_line, drawn.removesuffix("\n").split("\n")))
    assert json.dumps(_status(evil)).isprintable(), "what `status --json` prints"


@evil_texts
def test_nothing_forges_a_line_of_a_jobs_log(tmp_path: Path, evil: str) -> None:
    job_logs = JobLogs()
    sink = job_logs.listen()
    try:
        job_logs.open("job", Lane.TRAIN)
        log = ChildLog(tmp_path / "train.log", 100_000, lambda line: job_logs.print("job", line))
        log.feed(f"{evil}\n".encode("utf-8", "surrogatepass"))
        log.close()
        try:
            raise ValueError(evil)
        except ValueError:
            logger.bind(job_id="job").opt(exception=True).error("the server said {}", evil)
        page = job_logs.read("job", 0)
    finally:
        logger.remove(sink)
    assert page is not None
    assert [line.by for line in page.lines][-1] == "worker"
    assert len(page.lines) > 3
    assert all(is_one_harmless_line(line.text) for line in page.lines)
    told = {"at": "2026-01-09T19:30:00+00:00", "by": "child", "level": evil, "text": evil}
    for by in ("child", "worker"):
        assert is_one_harmless_line(job_line({**told, "by": by}).plain)


@evil_texts
def test_nothing_forges_a_finding_of_the_doctor(monkeypatch: pytest.MonkeyPatch, evil: str) -> None:
    monkeypatch.setattr(doctor, "findings", lambda _settings: [doctor.Finding("server", False, evil)])
    assert _printed(lambda console: doctor.examine(Settings(), console)) == (
        f"FAILED server   {logs.escape(evil)}"
    )


@evil_texts
def test_nothing_forges_a_line_of_the_demo(evil: str) -> None:
    line = _printed(lambda console: print_facts(console, {"job": evil})).strip("\n ")
    assert is_one_harmless_line(line)
    assert line == f"job  {logs.escape(evil)}".rstrip()


def _printed(tell: Any) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    tell(Console(file=stream, force_terminal=False, width=1000))
    stream.flush()
    return stream.buffer.getvalue().decode().removesuffix("\n")


def test_nothing_becomes_html_on_the_servers_pages(shared_server: ReferenceServer, tmp_path: Path) -> None:
    model = tmp_path / "m.pt"
    model.write_bytes(b"model")
    shared_server.add_model(model, model_name="yolo11", version="v3", active=True)
    worker = Talker(shared_server, "inference")
    paths = ["/jobs", "/logs", "/alerts", "/batches"]
    evils = [text for text in EVIL.values() if "\x00" not in text and "\ud800" not in text]
    for evil in evils:
        job_id = shared_server.request_inference(image_url="s3://datasets/x.jpg", purpose="fraud_check")
        found = {"class": evil, "confidence": 0.5, "bbox": [0, 0, 1, 1]}
        comparison = {"mismatch": True, "reasons": [{"code": evil, "message": evil}]}
        result = {"detections": [found], "comparison": comparison, "model_used": evil, evil: evil}
        worker.finish(job_id, worker.take(job_id), "completed", result=result)
        paths.append(f"/job?job_id={job_id}")
        job_id = shared_server.request_inference(image_url="s3://datasets/y.jpg")
        error = {"code": "image_invalid", "message": evil}
        worker.finish(job_id, worker.take(job_id), "failed", error=error)
        paths.append(f"/job?job_id={job_id}")
    seen = ""
    for path in paths:
        answer = requests.get(shared_server.url + path, auth=("any", shared_server.admin_token), timeout=10)
        assert answer.status_code == 200, path
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        tags = set(re.findall(r"<\s*/?\s*([a-zA-Z!]+)", answer.text))
        assert "script" not in tags
        assert "red" not in tags
        assert not re.search(r"<[^>]*onmouseover", answer.text)
        assert str(7777 * 7777) not in answer.text, "a template was run"
        seen += html.unescape(answer.text)
    assert "<script>alert(1)</script>" in seen, "it was there to be shown"


@pytest.mark.slow
def test_a_hostile_server_and_a_hostile_job_forge_nothing_in_a_real_daemon(tmp_path: Path) -> None:
    """All of it at once: ids and error bodies of the server, messages and log lines of a child."""
    all_of_it = " ".join(EVIL.values())
    with open_stage(tmp_path) as stage:
        body = json.dumps({"message": all_of_it, "reason": all_of_it}).encode()
        for kind in ("worker-status", "progress", "claim"):
            stage.network.on(kind, lambda visit: visit.reply(Answer(422, body)))
        page = all_of_it.encode("utf-8", "replace")
        stage.network.on("offer", lambda visit: visit.reply(Answer(500, page)))
        # Half a pair cannot stand in the server's own answers.
        failed = stage.queue(then="fail", message=all_of_it.replace("\ud800", ""))
        told = stage.first_error(failed)["message"]
        offered = {"job_id": f"x{all_of_it[:200]}", "id": 1, "job_type": "stub", "priority": 0, "config": {}}
        jobs = json.dumps({"jobs": [offered, {**offered, "job_type": all_of_it}]}).encode()
        stage.network.on("offer", lambda visit: visit.reply(Answer(200, jobs)))
        stage.queue(then="flood_log", at_most_bytes=100_000)
        stage.network.wait_for(lambda request: request.kind == "claim" and "forged" in request.job_id)
        stage.the_next_job_completes()
        shown = {
            command: subprocess.run(
                [sys.executable, "-m", "rvmcv_worker.cli", *command, "--config", stage.worker.config_file],
                capture_output=True,
                text=True,
                check=True,
                env=stage.worker.environment,
            ).stdout
            for command in (("status",), ("status", "--json"))
        }
    lines = stage.worker.log_file.read_text().removesuffix("\n").split("\n")
    assert [line for line in lines if not is_one_harmless_line(line)] == []
    assert [line for line in lines if not re.match(r"\d{4}-\d\d-\d\d |  ", line)] == []
    assert "forged" in "".join(lines), "it came through, escaped"
    assert all(is_one_harmless_line(line) for line in told.split("\n"))
    for text in shown.values():
        assert all(map(is_one_harmless_line, text.removesuffix("\n").split("\n")))
