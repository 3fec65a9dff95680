"""Alerts: what makes one, that it makes one only, and that the webhook hears of it."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings, Timing
from tests.reference_talker import FakeClock, Talker, headers

SECRET = "a secret that both know"
MISMATCH = {
    "detections": [],
    "comparison": {
        "mismatch": True,
        "reasons": [{"code": "class_differs", "message": "the machine saw PET, the server HDPE"}],
    },
}


@pytest.fixture(scope="module")
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="module")
def server(clock: FakeClock, database_url: str) -> Iterator[ReferenceServer]:
    with ReferenceServer(clock=clock, reap=False, database_url=database_url) as running:
        yield running


@pytest.fixture
def worker(server: ReferenceServer) -> Talker:
    server.reap()
    return Talker(server)


def call(server: ReferenceServer, method: str, path: str, **options: Any) -> requests.Response:
    url = f"{server.url}/api/v1/cv/{path}"
    return requests.request(method, url, headers=headers(server.admin_token), timeout=30, **options)


def alerts_of(server: ReferenceServer, subject: str) -> list[dict[str, Any]]:
    return [alert for alert in server.alerts() if subject in (alert["job_id"], alert["worker_id"])]


def let_time_pass(server: ReferenceServer, clock: FakeClock, seconds: float) -> None:
    """The server is there all the while: its reaper ticks."""
    for _ in range(round(seconds / 10)):
        clock.advance(10)
        server.reap()


def test_mismatch_makes_an_alert(server: ReferenceServer, worker: Talker) -> None:
    job_id = server.queue_inference({"image_url": "s3://datasets/x.jpg", "purpose": "fraud_check"})
    token = worker.take(job_id)
    finish_id = "0b8f8a52-6a5d-4a51-8f0c-0b1f6c6cf1aa"
    for _ in range(2):
        assert worker.finish(job_id, token, "completed", finish_id, result=MISMATCH).status_code == 200
    (alert,) = alerts_of(server, job_id)
    assert (alert["kind"], alert["webhook"]) == ("mismatch", "none")
    assert "the machine saw PET, the server HDPE" in alert["message"]
    assert alert["details"]["image_url"] == "s3://datasets/x.jpg"
    assert alert["details"]["reasons"] == MISMATCH["comparison"]["reasons"]  # type: ignore[index]


def test_agreement_makes_none(server: ReferenceServer, worker: Talker) -> None:
    job_id = server.queue_inference({"image_url": "s3://datasets/x.jpg"})
    result = {"detections": [], "comparison": {"mismatch": False, "reasons": []}}
    worker.finish(job_id, worker.take(job_id), "completed", result=result)
    assert alerts_of(server, job_id) == []


def test_failed_job_makes_an_alert(server: ReferenceServer, worker: Talker) -> None:
    job_id = worker.queue()
    error = {"code": "dataset_invalid", "message": "labels/a\0.txt:3"}
    assert worker.finish(job_id, worker.take(job_id), "failed", error=error).status_code == 200
    (alert,) = alerts_of(server, job_id)
    assert (alert["kind"], alert["message"]) == ("job_failed", "labels/a\ufffd.txt:3")
    assert alert["details"] == {"job_type": worker.job_type, "code": "dataset_invalid"}


def test_poisoned_job_makes_one_alert(server: ReferenceServer, worker: Talker, clock: FakeClock) -> None:
    job_id = worker.queue()
    for _ in range(3):
        clock.advance(3600)
        server.reap()
        worker.hand_back(job_id, worker.take(job_id), "job_crashed")
    assert alerts_of(server, job_id) == []
    clock.advance(3600)
    server.reap()
    for _ in range(2):
        assert worker.poll() == []
    (alert,) = alerts_of(server, job_id)
    assert alert["kind"] == "job_poisoned"
    assert "a job_crashed" in alert["message"]


def test_cancelled_job_makes_none(server: ReferenceServer, worker: Talker) -> None:
    job_id = worker.queue()
    token = worker.take(job_id)
    server.cancel(job_id)
    worker.finish(job_id, token, "cancelled")
    assert alerts_of(server, job_id) == []


def test_worker_that_falls_silent_while_jobs_wait(
    server: ReferenceServer, worker: Talker, clock: FakeClock
) -> None:
    worker.status()
    job_id = worker.queue()
    let_time_pass(server, clock, 60)
    assert alerts_of(server, worker.worker_id) == []
    let_time_pass(server, clock, 60)
    (alert,) = alerts_of(server, worker.worker_id)
    assert alert["kind"] == "worker_silent"
    let_time_pass(server, clock, 300)
    assert len(alerts_of(server, worker.worker_id)) == 1
    # It comes back, and falls silent a second time.
    worker.status()
    let_time_pass(server, clock, 120)
    assert len(alerts_of(server, worker.worker_id)) == 2
    server.cancel(job_id)


def test_who_only_looked_is_not_missed(server: ReferenceServer, worker: Talker, clock: FakeClock) -> None:
    job_id = worker.queue()
    assert worker.poll(job_types="doctor") == []  # as `rvmcv-worker doctor` does, never to come again
    let_time_pass(server, clock, 300)
    assert alerts_of(server, worker.worker_id) == []
    server.cancel(job_id)


def test_worker_is_not_missed_while_nothing_waits(
    server: ReferenceServer, worker: Talker, clock: FakeClock
) -> None:
    for job in call(server, "GET", "training-jobs?status=queued&per_page=200").json()["data"]:
        server.cancel(job["job_id"])
    worker.status()
    let_time_pass(server, clock, 300)
    assert alerts_of(server, worker.worker_id) == []


def test_worker_is_not_missed_while_the_server_was_away(
    server: ReferenceServer, worker: Talker, clock: FakeClock
) -> None:
    job_id = worker.queue()
    worker.status()
    clock.advance(3600)
    server.reap()
    let_time_pass(server, clock, 50)
    worker.status()
    let_time_pass(server, clock, 50)
    assert alerts_of(server, worker.worker_id) == []
    server.cancel(job_id)


def test_alerts_are_filtered_and_acknowledged(server: ReferenceServer, worker: Talker) -> None:
    job_id = worker.queue()
    worker.finish(job_id, worker.take(job_id), "failed", error={"code": "internal", "message": "a bug"})
    (alert,) = alerts_of(server, job_id)

    def listed(query: str) -> list[int]:
        answer = call(server, "GET", f"alerts?{query}&per_page=200")
        assert answer.status_code == 200, answer.text
        return [each["id"] for each in answer.json()["data"]]

    assert alert["id"] in listed("kind=job_failed&acknowledged=false")
    assert alert["id"] not in listed("kind=mismatch")
    answer = call(server, "POST", f"alerts/{alert['id']}/acknowledge")
    assert answer.json()["acknowledged_by"] == "admin"
    again = call(server, "POST", f"alerts/{alert['id']}/acknowledge").json()
    assert again == answer.json()
    assert alert["id"] not in listed("acknowledged=false")
    assert alert["id"] in listed("acknowledged=true")
    assert call(server, "POST", "alerts/999999/acknowledge").status_code == 404
    assert call(server, "GET", "alerts?kind=fun").status_code == 422


class Receiver(ThreadingHTTPServer):
    """A webhook that answers as it is told and keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.news = threading.Condition()
        #: Requests wait for it.
        self.open = threading.Event()
        self.open.set()
        self.url = f"http://127.0.0.1:{self.server_port}/hook"

    def wait_for(self, count: int) -> None:
        with self.news:
            assert self.news.wait_for(lambda: len(self.got) >= count, 20), self.got


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.news:
            self.server.got.append((dict(self.headers), body))
            status = self.server.answers.pop(0) if self.server.answers else 204
            self.server.news.notify_all()
        self.server.open.wait(20)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.open.set()
        made.shutdown()
        thread.join()


def hooked(receiver: Receiver, **timing: float) -> ReferenceServer:
    quick = Timing(reap_every_s=0.02, webhook_delay_s=0.02, **timing)
    return ReferenceServer(
        settings=Settings(timing=quick, webhook_url=receiver.url, webhook_secret=SECRET), reap=False
    )


def fail_a_job(server: ReferenceServer, message: str = "broken") -> str:
    worker = Talker(server)
    job_id = worker.queue()
    worker.finish(job_id, worker.take(job_id), "failed", error={"code": "internal", "message": message})
    return job_id


def wait_for_webhook(server: ReferenceServer, job_id: str, state: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        return next((alert for alert in alerts_of(server, job_id) if alert["webhook"] == state), None)

    with server._queue.changed:
        found = server._queue.changed.wait_for(look, 20)
    assert found, server.alerts()
    return found


def test_webhook_is_sent_what_is_signed(receiver: Receiver) -> None:
    with hooked(receiver) as server:
        job_id = fail_a_job(server, "größer <als> nötig")
        receiver.wait_for(1)
        (told, body) = receiver.got[0]
        signature = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
        assert told["X-RVM-Signature"] == f"sha256={signature}"
        assert told["Content-Type"] == "application/json"
        alert = wait_for_webhook(server, job_id, "sent")
        assert told["X-RVM-Alert"] == str(alert["id"])
        sent = json.loads(body)
        assert sent == {key: value for key, value in alert.items() if not key.startswith("webhook")}
        assert sent["message"] == "größer <als> nötig"


def test_webhook_is_called_again_until_it_takes_the_alert_and_then_no_more(receiver: Receiver) -> None:
    receiver.answers = [500, 302, 404]
    with hooked(receiver) as server:
        first = fail_a_job(server)
        alert = wait_for_webhook(server, first, "sent")
        assert (alert["webhook_tries"], alert["webhook_error"]) == (4, None)
        second = fail_a_job(server)
        wait_for_webhook(server, second, "sent")
    assert [json.loads(body)["job_id"] for _headers, body in receiver.got] == [first] * 4 + [second]


def test_webhook_that_hangs_blocks_no_finish(receiver: Receiver) -> None:
    receiver.open.clear()
    with hooked(receiver) as server:
        fail_a_job(server)
        receiver.wait_for(1)
        # While that call hangs:
        second = fail_a_job(server)
        assert server.job(second)["status"] == "failed"
        assert alerts_of(server, second)[0]["webhook"] == "waiting"
        receiver.open.set()
        wait_for_webhook(server, second, "sent")


def test_webhook_that_never_answers_is_given_up(receiver: Receiver) -> None:
    url = receiver.url
    timing = Timing(reap_every_s=0.02, webhook_delay_s=0.02, webhook_give_up_s=1.5)
    with ReferenceServer(reap=False, settings=Settings(timing=timing, webhook_url=url + "/../x")) as server:
        receiver.answers = [503] * 1000
        alert = wait_for_webhook(server, fail_a_job(server), "given_up")
        assert alert["webhook_error"] == "answered 503"
        assert alert["webhook_tries"] > 1
        # Without a secret nothing is signed.
        assert "X-RVM-Signature" not in receiver.got[0][0]


def test_alert_waits_for_a_webhook_that_is_away_over_a_restart(receiver: Receiver, tmp_path: Any) -> None:
    timing = Timing(reap_every_s=0.02, webhook_delay_s=0.02)
    away = Settings(timing=timing, webhook_url="http://127.0.0.1:9/none")
    with ReferenceServer(tmp_path, reap=False, settings=away) as server:
        job_id = fail_a_job(server)
    with ReferenceServer(
        tmp_path, reap=False, settings=Settings(timing=timing, webhook_url=receiver.url)
    ) as server:
        wait_for_webhook(server, job_id, "sent")
    assert len(receiver.got) == 1


def test_webhook_must_be_a_url() -> None:
    with pytest.raises(ValueError, match="http"):
        ReferenceServer(settings=Settings(webhook_url="example.org"))
