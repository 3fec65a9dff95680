"""Rows 1 to 8, 40 and 42 of the fault list: what a network and a server in trouble do to the worker."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rvmcv_worker.config import ServerSettings
from rvmcv_worker.reference.server import ReferenceServer
from tests.bad_network import BadNetwork, Request
from tests.certificates import self_signed
from tests.fault_stage import QUICK, Stage, open_stage
from tests.network_faults import HTML, Behaviour, Visit, cut, drop_answer, drop_request, half_open, says
from tests.worker_process import WorkerProcess, eventually

pytestmark = pytest.mark.slow

SCALE = 0.01
_MB = 1_000_000


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with open_stage(tmp_path_factory.mktemp("network"), scale=SCALE) as opened:
        yield opened


def _said(requests: list[Request], state: str) -> list[str]:
    """Return the reasons of the worker statuses that name `state`, whether they arrived or not."""
    return [
        reason
        for request in requests
        if request.said.get("state") == state
        for reason in request.said["reasons"]
    ]


def test_row_01_a_server_that_is_away_for_an_hour_costs_nothing(tmp_path: Path) -> None:
    scale = 0.002
    hour_s = 3600 * scale
    with open_stage(tmp_path, scale=scale) as stage:
        job_id = stage.run_until_progress(steps=40, step_s=0.05)
        first = len(stage.network.requests)
        with stage.network.all_requests(drop_request):
            stage.network.closing.wait(hour_s)
            away = stage.network.requests[first:]
            assert stage.worker.workspace_files(), "the job waits with its result"
        assert "RVM-Server does not take the worker status" in _said(away, "degraded")
        stage.completes(job_id)
        offers = [request.at_s for request in stage.network.seen("offer") if request.at_s > away[0].at_s]
        # Its one slot was taken: what was tried again during the hour is the report before the upload.
        tries = [request.at_s for request in away if request.kind == "progress"]
        gaps_s = [later - earlier for earlier, later in itertools.pairwise(tries)]
        assert len(tries) > 20
        assert statistics.median(gaps_s) < 60 * scale
        assert statistics.pstdev(gaps_s) > 0.05 * 60 * scale, "no jitter"
        assert offers, "it polls again"
        stage.nothing_is_left()


def test_row_01_an_idle_worker_backs_off_to_a_minute(stage: Stage) -> None:
    with stage.network.all_requests(drop_request):
        first = len(stage.network.requests)
        stage.network.closing.wait(300 * SCALE)
        tries = [request.at_s for request in stage.network.requests[first:] if request.kind == "offer"]
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert 5 <= len(tries) <= 60, "a minute is the longest wait, half of one the usual"
    assert max(gaps_s[:2]) < max(gaps_s)
    stage.the_next_job_completes()


@pytest.mark.parametrize("status", [401, 403])
def test_row_02_a_rejected_token_stops_claims_and_no_job(stage: Stage, status: int) -> None:
    job_id = stage.run_until_progress(steps=30, step_s=0.05)
    first = len(stage.network.requests)
    with stage.network.all_requests(says(status, {"message": "Unauthenticated."})):
        stage.network.wait_for(lambda request: "rejects the worker's token" in str(request.said), since=first)
        waiting = stage.queue()
        stage.network.closing.wait(2 * 60 * SCALE)
        assert stage.worker.tree()
        assert stage.server.job(waiting)["status"] == "queued"
    stage.completes(job_id)
    stage.completes(waiting)
    stage.nothing_is_left()


def test_row_03_retry_after_is_honoured(stage: Stage) -> None:
    assert 30 * SCALE <= _gap_after(stage, Retry_After="30") < 60 * SCALE + 1


def test_row_03_retry_after_is_capped_at_five_minutes(stage: Stage) -> None:
    assert 300 * SCALE <= _gap_after(stage, Retry_After="86400") < 360 * SCALE + 1
    stage.the_next_job_completes()


def _gap_after(stage: Stage, **headers: str) -> float:
    """Answer a poll by 429; return how long the next one takes to come, in seconds."""
    rule = stage.network.on("offer", says(429, {"message": "Too Many Attempts."}, **headers))
    rule.wait()
    refused = stage.network.seen("offer")[-1]
    following = stage.network.wait_for(lambda request: request.kind == "offer", since=refused.number + 1)
    return following.at_s - refused.at_s


class _Endless:
    """A body of `size_bytes`, or without end, in chunks; `sent` counts until the worker has had enough."""

    def __init__(self, size_bytes: int | None) -> None:
        self.size_bytes = size_bytes
        self.sent = 0

    def __call__(self, visit: Visit) -> None:
        head = f"Content-Length: {self.size_bytes}" if self.size_bytes else "Transfer-Encoding: chunked"
        visit.connection.sendall(
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{head}\r\n\r\n".encode()
        )
        piece = b" " * 65536
        framed = piece if self.size_bytes else f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        with contextlib.suppress(OSError):
            while self.size_bytes is None or self.sent < self.size_bytes:
                visit.connection.sendall(framed)
                self.sent += len(piece)


@pytest.mark.parametrize("kind", ["offer", "claim", "progress", "finish", "worker-status"])
@pytest.mark.parametrize(
    "answer", [says(200, HTML), says(200, b'{"jobs": [{'), cut], ids=["html", "no-json", "cut"]
)
def test_row_04_an_answer_that_is_none_is_asked_for_again(stage: Stage, kind: str, answer: Behaviour) -> None:
    rule = stage.network.on(kind, answer)
    job_id = stage.queue()
    rule.wait()
    stage.completes(job_id)
    stage.nothing_is_left()


@pytest.mark.parametrize("size_bytes", [50 * _MB, None], ids=["50 MB", "without end"])
def test_row_04_a_long_answer_is_cut(stage: Stage, size_bytes: int | None) -> None:
    daemon = psutil.Process(stage.worker.pid)
    before_bytes = daemon.memory_info().rss
    answer = _Endless(size_bytes)
    rule = stage.network.on("claim", answer)
    job_id = stage.queue()
    rule.wait()
    stage.completes(job_id)
    assert answer.sent < 8.4 * _MB + 8 * _MB, "8 MB, and what sockets hold"
    assert daemon.memory_info().rss - before_bytes < 40 * _MB


def test_row_04_an_answer_that_never_comes_is_given_up_at_the_deadline(stage: Stage) -> None:
    rule = stage.network.on("claim", half_open)
    job_id = stage.queue()
    rule.wait()
    first = stage.network.seen("claim", job_id)[0]
    again = stage.network.wait_for(lambda request: request.job_id == job_id, since=first.number + 1)
    assert 1.0 <= again.at_s - first.at_s < 4.0
    stage.completes(job_id)


def test_row_05_a_redirect_is_not_followed(stage: Stage) -> None:
    with BadNetwork("http://127.0.0.1:9") as elsewhere:
        redirect = says(302, Location=f"{elsewhere.url}/login")
        kinds = ("offer", "claim", "progress", "finish", "worker-status")
        rules = [stage.network.on(kind, redirect) for kind in kinds]
        stage.completes(stage.queue())
        for rule in rules:
            rule.wait()
        assert elsewhere.requests == []
    assert "redirects to 127.0.0.1: refused" in stage.worker.log()


def test_row_06_neither_netrc_nor_proxy_of_the_environment_counts(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    with BadNetwork("http://127.0.0.1:9") as trap:
        proxies = {f"{name}_PROXY": trap.url for name in ("HTTP", "HTTPS", "ALL")}
        proxies |= {name.lower(): value for name, value in proxies.items()}
        with open_stage(tmp_path, environment={"HOME": str(tmp_path), **proxies}) as stage:
            stage.completes(stage.queue())
            tokens = {request.headers.get("Authorization") for request in stage.network.requests}
            assert tokens == {f"Bearer {stage.server.worker_token}"}
        assert trap.requests == []


@pytest.mark.parametrize(("expired", "known"), [(False, False), (True, True)], ids=["unknown", "expired"])
def test_row_07_a_wrong_certificate_is_refused(tmp_path: Path, expired: bool, known: bool) -> None:
    certificate, key = self_signed(tmp_path, expired=expired)
    with ReferenceServer(tmp_path / "server", tls_cert=certificate, tls_key=key) as server:
        extra = {"server": {**QUICK["server"], "ca_file": str(certificate) if known else None}}
        with WorkerProcess(tmp_path / "worker", server, scale=SCALE, extra=extra) as worker:
            eventually(lambda: "certificate refused" in worker.log())
            assert server.workers() == []
            assert server.polls == 0


def test_row_07_a_ca_of_ones_own_is_named_and_there_is_no_other_way(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    with ReferenceServer(tmp_path / "server", tls_cert=certificate, tls_key=key) as server:
        extra = {"server": {**QUICK["server"], "ca_file": str(certificate)}}
        with WorkerProcess(tmp_path / "worker", server, scale=SCALE, extra=extra):
            job_id = server.queue_training({"steps": 1}, job_type="stub")
            assert server.wait_until_final(job_id, 30)["status"] == "completed"
    assert not [name for name in ServerSettings.model_fields if "verify" in name or "insecure" in name]


@pytest.mark.parametrize("loss", [drop_answer, cut], ids=["dropped", "cut"])
def test_row_08_a_claim_whose_answer_is_lost_is_repeated_and_runs_once(stage: Stage, loss: Behaviour) -> None:
    rule = stage.network.on("claim", loss)
    job_id = stage.queue()
    rule.wait()
    stage.completes(job_id)
    claims = stage.network.seen("claim", job_id)
    assert len(claims) == 2
    assert len({claim.said["claim_id"] for claim in claims}) == 1
    assert len([line for line in stage.worker.log().splitlines() if f"job.claimed [{job_id}]" in line]) == 1


def test_row_40_a_server_replaced_by_404s_in_html_costs_no_job(stage: Stage) -> None:
    job_id = stage.run_until_progress(steps=40, step_s=0.05)
    with stage.network.all_requests(says(404, HTML)):
        stage.network.closing.wait(600 * SCALE)
        assert stage.worker.is_alive()
        assert stage.worker.workspace_files(), "the job waits with its result"
    stage.completes(job_id)
    stage.the_next_job_completes()


def test_row_42_a_claim_that_is_always_refused_is_tried_ever_less(stage: Stage) -> None:
    def refused(name: str) -> list[float]:
        offer = {"job_id": name, "id": 1, "job_type": "stub", "config": {"steps": 1}}
        polls = stage.network.on("offer", says(200, {"jobs": [offer]}), times=None)
        claims = stage.network.on("claim", says(409, {"reason": "taken"}), times=None, job_id=name)
        stage.network.closing.wait(2.0)
        polls.release()
        claims.release()
        return [request.at_s for request in stage.network.seen("claim", name)]

    _slows_down(refused("always-taken"))
    stage.the_next_job_completes()


@pytest.mark.parametrize(
    "offer",
    [
        {"job_id": "no-config", "id": 1, "job_type": "stub"},
        {"job_id": "bad-config", "id": 1, "job_type": "stub", "config": {"steps": -1}},
        {"job_id": "no-such-type", "id": 1, "job_type": "carpentry", "config": {}},
    ],
    ids=lambda offer: str(offer["job_id"]),
)
def test_row_42_a_job_that_never_validates_and_is_offered_again_is_tried_ever_less(
    stage: Stage, offer: dict[str, object]
) -> None:
    claim = {"lease_token": "t", "attempt": 1, "lease_s": 60, "report_interval_s": 2}
    name = str(offer["job_id"])
    rules = [
        stage.network.on("offer", says(200, {"jobs": [offer]}), times=None),
        stage.network.on("claim", says(200, claim), times=None, job_id=name),
        stage.network.on("progress", says(200, {"directive": "continue"}), times=None, job_id=name),
        stage.network.on("finish", says(200, {"accepted": True}), times=None, job_id=name),
    ]
    stage.network.closing.wait(2.0)
    for rule in rules:
        rule.release()
    assert all(
        request.said["error"]["code"] in {"invalid_job", "unsupported_job"}
        for request in stage.network.seen("finish", name)
    )
    _slows_down([request.at_s for request in stage.network.seen("claim", name)])
    stage.the_next_job_completes()


def _slows_down(times_s: list[float]) -> None:
    """At most a try a second, doubling, as `SCALE` makes it: in 2 s about log2(200) of them."""
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    assert 3 <= len(times_s) <= 10, f"{len(times_s)} tries"
    assert all(gap_s >= SCALE * 2**n * 0.9 for n, gap_s in enumerate(gaps_s)), gaps_s
