"""What Prometheus and a probe see of a real daemon, and whether dashboard, alerts and page ask for that."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from rvmcv_worker.control_client import ControlClient
from rvmcv_worker.reference.server import ReferenceServer
from tests.fake_nvml import FakeNvml
from tests.health_page import get
from tests.promql import named_in
from tests.worker_process import WorkerProcess, eventually

DOCS = Path(__file__).parents[2] / "docs"
ALERT_TESTS = Path(__file__).parents[1] / "prometheus-alerts.test.yml"
PROMTOOL = shutil.which("promtool")
#: Longest that a probe may take to answer while something hangs, in seconds.
AT_ONCE_S = 1.0
#: Of every sample that Prometheus scrapes.
SCRAPED = {"instance", "job"}


@dataclass
class Family:
    """A metric, its labels, and the values that these have."""

    kind: str
    told: str = ""
    labels: dict[str, set[str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer) -> ReferenceServer:
    return shared_server


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> FakeNvml:
    return FakeNvml(tmp_path_factory.mktemp("nvml") / "fake", gpu0_ecc=0).install()


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer, nvml: FakeNvml
) -> Iterator[WorkerProcess]:
    """A daemon with everything on, that has run jobs; without bubblewrap, as behind it no fake GPU is."""
    directory = tmp_path_factory.mktemp("worker")
    programs = directory / "bin"
    programs.mkdir()
    for name in ("choom", "prlimit", "setpriv"):
        found = shutil.which(name)
        assert found
        (programs / name).symlink_to(found)
    file = directory / "textfiles" / "rvmcv.prom"
    file.parent.mkdir()
    with WorkerProcess(
        directory,
        server,
        scale=0.05,
        environment={"PATH": str(programs), **nvml.environment},
        extra={"worker": {"metrics_file": str(file)}},
    ) as running:
        for config in ({}, {"then": "fail"}, {"then": '"} 1\nrvmcv_forged 2'}):
            job_id = server.queue_training({"steps": 2, **config}, job_type="stub")
            server.wait_until_final(job_id, 30)
        eventually(lambda: _status(running)["running"] == [])
        yield running


def _run_dir(worker: WorkerProcess) -> Path:
    return worker.config_file.parent / "run"


def _status(worker: WorkerProcess) -> dict[str, Any]:
    with contextlib.suppress(Exception):
        return ControlClient(_run_dir(worker)).status()
    return {"running": None}


def _text(worker: WorkerProcess) -> str:
    status, _, text = get(_run_dir(worker), "/metrics")
    assert status == 200
    return text


def _value(worker: WorkerProcess, metric: str, /, **labels: str) -> float | None:
    for family in text_string_to_metric_families(_text(worker)):
        for sample in family.samples:
            if sample.name == metric and labels.items() <= sample.labels.items():
                return sample.value
    return None


def _families(worker: WorkerProcess) -> dict[str, Family]:
    """Return the families by the name that a table would list."""
    found = {}
    for family in text_string_to_metric_families(_text(worker)):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        described = found[name] = Family(family.type, family.documentation)
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label not in {"le", "quantile"}:
                    described.labels.setdefault(label, set()).add(value)
    return found


@pytest.fixture(scope="module")
def families(worker: WorkerProcess) -> dict[str, Family]:
    return _families(worker)


def _family(families: dict[str, Family], metric: str) -> Family | None:
    """Return what a sample of this name belongs to."""
    if metric == "node_textfile_mtime_seconds":  # node_exporter's own
        return Family("gauge", labels={"file": set()})
    plain = re.sub(r"_(bucket|count|sum)$", "", metric)
    if metric != plain and families.get(plain, Family("")).kind in {"histogram", "summary"}:
        return families[plain]
    return families.get(metric)


def test_the_page_is_what_prometheus_reads(worker: WorkerProcess) -> None:
    _, content_type, text = get(_run_dir(worker), "/metrics")
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert text.endswith("\n")
    names = re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE)
    assert len(names) == len(set(names)) > 40
    assert all(name.startswith("rvmcv_") for name in names)
    if PROMTOOL:
        linted = subprocess.run(
            [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")


def test_jobs_are_counted_by_type_status_and_code(worker: WorkerProcess) -> None:
    ends = {"completed": "none", "failed": "dataset_invalid"}
    for status, code in ends.items():
        counted = _value(worker, "rvmcv_job_ends_total", job_type="stub", status=status, code=code)
        assert counted == 1, status
    invalid = {"job_type": "stub", "status": "failed", "code": "invalid_job"}
    assert _value(worker, "rvmcv_job_ends_total", **invalid) == 1
    assert _value(worker, "rvmcv_job_duration_seconds_count", status="completed") == 1
    assert _value(worker, "rvmcv_job_phase_duration_seconds_count", phase="train") == 3
    assert _value(worker, "rvmcv_claims_total", lane="train", outcome="granted") == 3
    assert _value(worker, "rvmcv_stored_files_total", kind="artifact") == 1
    assert _value(worker, "rvmcv_stored_bytes_total", kind="artifact") == 4096
    for call in ("poll", "claim", "progress", "finish", "worker_status"):
        counted = _value(worker, "rvmcv_server_request_duration_seconds_count", call=call, outcome="ok")
        assert counted, call


def test_labels_hold_nothing_that_a_job_says(worker: WorkerProcess) -> None:
    text = _text(worker)
    assert "forged" not in text
    assert "train_stub_" not in text  # every job's id begins so
    assert len(text.splitlines()) < 600


def test_a_running_job_is_seen(worker: WorkerProcess, server: ReferenceServer) -> None:
    job_id = server.queue_training({"steps": 10_000, "step_s": 0.05}, job_type="stub")
    eventually(lambda: _value(worker, "rvmcv_jobs_running", job_type="stub") == 1)
    assert (_value(worker, "rvmcv_jobs_running_longest_seconds", job_type="stub") or 0) > 0
    assert _value(worker, "rvmcv_lane_slots_free", lane="train") == 0
    assert get(_run_dir(worker), "/readyz")[0] == 200
    server.cancel(job_id)
    server.wait_until_final(job_id, 30)
    ended = {"job_type": "stub", "status": "cancelled", "code": "none"}
    eventually(lambda: _value(worker, "rvmcv_job_ends_total", **ended) == 1)
    eventually(lambda: _value(worker, "rvmcv_lane_slots_free", lane="train") == 1)


def test_a_gpu_is_shown_as_it_is(worker: WorkerProcess, nvml: FakeNvml) -> None:
    nvml.set(gpu0_temperature=71, gpu0_utilization=83, gpu0_power_mw=212_500, gpu0_ecc=0)
    eventually(lambda: _value(worker, "rvmcv_gpu_temperature_celsius", gpu="0") == 71)
    assert _value(worker, "rvmcv_gpu_utilization_ratio", gpu="0") == pytest.approx(0.83)
    assert _value(worker, "rvmcv_gpu_power_watts", gpu="0") == pytest.approx(212.5)
    assert _value(worker, "rvmcv_gpu_fit", gpu="0") == 1
    assert _value(worker, "rvmcv_gpu_info", gpu="0", name="Fake RTX 0", uuid="GPU-fake-0") == 1


def test_a_pause_is_not_ready_and_its_wisher_is_shown(worker: WorkerProcess) -> None:
    client = ControlClient(_run_dir(worker))
    client.tell("pause")
    try:
        status, _, body = get(_run_dir(worker), "/readyz")
        assert (status, json.loads(body)["state"], json.loads(body)["ready"]) == (503, "paused", False) or (
            status,
            json.loads(body)["state"],
        ) == (503, "degraded")
        assert _value(worker, "rvmcv_worker_ready") == 0
        assert _value(worker, "rvmcv_worker_wish", by="operator", wish="pause") == 1
    finally:
        client.tell("resume")
    assert get(_run_dir(worker), "/readyz")[0] == 200


def test_a_gpu_library_that_hangs_delays_no_answer(worker: WorkerProcess, nvml: FakeNvml) -> None:
    nvml.set(hang=1)
    try:
        eventually(lambda: _value(worker, "rvmcv_gpu_fit", gpu="0") == 0)
        assert _timed(worker, "/healthz") == 200
        eventually(lambda: _timed(worker, "/readyz") == 503)
        assert _timed(worker, "/metrics") == 200
        assert _value(worker, "rvmcv_gpu_temperature_celsius") is None
        assert _value(worker, "rvmcv_gpu_memory_size_bytes", gpu="0")
    finally:
        nvml.set(hang=0)
    eventually(lambda: _timed(worker, "/readyz") == 200)


def test_a_ledger_that_is_locked_delays_no_answer(worker: WorkerProcess, server: ReferenceServer) -> None:
    job_id = server.queue_training({"steps": 4, "step_s": 0.05}, job_type="stub")
    eventually(lambda: _value(worker, "rvmcv_jobs_running", job_type="stub") == 1)
    with contextlib.closing(sqlite3.connect(worker.ledger_file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        eventually(lambda: _value(worker, "rvmcv_ledger_readable") == 0)
        assert _value(worker, "rvmcv_outbox_reports") is None
        assert [_timed(worker, path) for path in ("/healthz", "/readyz", "/metrics")] == [200, 200, 200]
        assert _longest_silence_s(server, "vm102", 3) < 2, "the leases are renewed"
        other.execute("ROLLBACK")
    eventually(lambda: _value(worker, "rvmcv_ledger_readable") == 1)
    assert server.wait_until_final(job_id, 30)["status"] == "completed"
    eventually(lambda: _value(worker, "rvmcv_outbox_reports") == 0)


def _longest_silence_s(server: ReferenceServer, worker_id: str, watched_s: float) -> float:
    """Return how long the worker said nothing to RVM-Server, at most, in seconds."""
    longest_s, until_s = 0.0, time.monotonic() + watched_s
    while time.monotonic() < until_s:
        (shown,) = (each for each in server.workers() if each["worker_id"] == worker_id)
        longest_s = max(longest_s, shown["seen_s_ago"])
    return longest_s


def test_a_disk_that_hangs_delays_no_answer_however_often_it_is_asked_about(
    tmp_path: Path, server: ReferenceServer
) -> None:
    hangs = tmp_path / "hangs"
    with WorkerProcess(
        tmp_path / "worker",
        server,
        worker_id="hanging",
        scale=0.05,
        program=("-m", "tests.faulty_worker"),
        environment={"FAULT": "disk hangs:1000000", "HANGS": str(hangs)},
    ) as worker:
        eventually(lambda: _status(worker).get("state") == "ready")
        hangs.touch()
        eventually(lambda: _status(worker)["disk"]["looked_ago_s"] > 0.5)
        for _ in range(40):  # more than the socket has places
            assert _timed(worker, "/metrics") == 200
        assert _timed(worker, "/healthz") == 200
        assert _longest_silence_s(server, "hanging", 0.5) < 2, "the leases are renewed"
        hangs.unlink()


def _timed(worker: WorkerProcess, path: str) -> int:
    begun_s = time.monotonic()
    status, _, _ = get(_run_dir(worker), path)
    assert time.monotonic() - begun_s < AT_ONCE_S, path
    return status


def test_nothing_listens_but_the_unix_socket(worker: WorkerProcess) -> None:
    for process in (psutil.Process(worker.pid), *worker.tree()):
        with contextlib.suppress(psutil.NoSuchProcess):
            inet = process.net_connections("inet")
            assert [c for c in inet if c.status == psutil.CONN_LISTEN or not c.raddr] == []
    unix = {Path(c.laddr) for c in psutil.Process(worker.pid).net_connections("unix") if c.laddr}
    # The kernel tells the name under which it was bound, before it was moved to its own.
    assert {path.parent for path in unix} == {_run_dir(worker)}


def test_the_textfile_is_what_the_socket_says(worker: WorkerProcess) -> None:
    file = worker.config_file.parent / "textfiles" / "rvmcv.prom"
    named = re.findall(r"^# TYPE (\w+) ", file.read_text(), re.MULTILINE)
    assert named == re.findall(r"^# TYPE (\w+) ", _text(worker), re.MULTILINE)


def test_the_page_of_metrics_lists_them_all(families: dict[str, Family]) -> None:
    rows = re.findall(
        r"^\| `(rvmcv_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", (DOCS / "metrics.md").read_text(), re.MULTILINE
    )
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels)), told) for name, kind, labels, told in rows}
    shown = {name: (family.kind, set(family.labels), family.told) for name, family in families.items()}
    assert listed == shown


def _expressions_of_the_dashboard() -> list[str]:
    board = json.loads((DOCS / "grafana-dashboard.json").read_text())
    found = []
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            found.append(target["expr"])
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert asked
            found.append(f"max by ({asked[2]}) ({asked[1]})")
    return found


def _rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DOCS / "prometheus-alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def _wrong(families: dict[str, Family], expression: str) -> list[str]:
    """Return what an expression asks for that the worker does not show."""
    named = named_in(expression)
    wrong = [metric for metric in named.metrics if _family(families, metric) is None]
    if wrong or not named.metrics:
        return wrong or ["no metric"]
    labels = set(SCRAPED)
    for metric in named.metrics:
        labels |= set(_family(families, metric).labels)  # type: ignore[union-attr]
        labels |= {"le"} if metric.endswith("_bucket") else set()
    wrong += named.grouped - labels
    for metric, label, value in named.matched:
        known = _family(families, metric)
        assert known
        if label not in {*known.labels, *SCRAPED}:
            wrong.append(f"{metric}{{{label}}}")
        # Which faults there are depends on the machine.
        elif (
            label not in SCRAPED
            and metric != "rvmcv_worker_fault"
            and value not in {None, *known.labels[label]}
        ):
            wrong.append(f"{metric}{{{label}={value}}}")
    return wrong


def test_the_dashboard_asks_only_for_what_there_is(families: dict[str, Family]) -> None:
    expressions = _expressions_of_the_dashboard()
    assert len(expressions) > 40
    assert {expression: wrong for expression in expressions if (wrong := _wrong(families, expression))} == {}


def test_what_the_dashboard_calls_its_lines_are_labels(families: dict[str, Family]) -> None:
    board = json.loads((DOCS / "grafana-dashboard.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            metrics = named_in(target["expr"]).metrics
            labels = {label for metric in metrics for label in _family(families, metric).labels}  # type: ignore[union-attr]
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]


def test_the_dashboard_shows_every_metric_but_sizes_that_say_little(families: dict[str, Family]) -> None:
    asked = {
        metric for expression in _expressions_of_the_dashboard() for metric in named_in(expression).metrics
    }
    shown = {
        name
        for name, family in families.items()
        if any(_family(families, metric) is family for metric in asked)
    }
    assert set(families) - shown == {
        "rvmcv_process_virtual_memory_bytes",
        "rvmcv_process_max_fds",
        "rvmcv_engine_state",
    }


def test_the_alerts_ask_only_for_what_there_is_and_say_what_to_do(families: dict[str, Family]) -> None:
    rules = _rules()
    assert {rule["alert"]: wrong for rule in rules if (wrong := _wrong(families, rule["expr"]))} == {}
    for rule in rules:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["action"]


def test_the_faults_that_alerts_name_are_the_worker_s() -> None:
    package = DOCS.parent / "rvmcv_worker"
    source = "".join(file.read_text() for file in package.glob("*.py"))
    named = {match[2] for rule in _rules() for match in named_in(rule["expr"]).matched if "fault" in match[0]}
    assert named == {"token", "server-status"}
    assert all(f'"{name}"' in source for name in named)


@pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool (Debian's package prometheus) to run the rules with"
)
def test_the_alerts_ring_when_they_should() -> None:
    assert PROMTOOL
    tested = subprocess.run(
        [PROMTOOL, "test", "rules", str(ALERT_TESTS)], capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize(
    "expression",
    ["rvmcv_worker_redy == 0", 'rvmcv_gpu_fit{card="0"} == 0', "sum by (gpu) (rvmcv_held_polls)"],
)
def test_a_slip_in_a_query_is_seen(families: dict[str, Family], expression: str) -> None:
    assert _wrong(families, expression)


def test_a_stop_takes_the_textfile_away(worker: WorkerProcess) -> None:
    assert worker.stop() == 0
    assert list((worker.config_file.parent / "textfiles").iterdir()) == []
