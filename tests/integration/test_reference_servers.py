"""Two server processes on one PostgreSQL: workers may call either, at any time."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import requests

from tests.postgres import Postgres
from tests.reference_process import ReferenceProcess
from tests.reference_talker import Talker, headers

pytestmark = pytest.mark.slow

LEASE_S = 2.0


@pytest.fixture(scope="module")
def database_url(postgres: Postgres) -> str:
    return postgres.new_database()


@pytest.fixture(scope="module")
def servers(
    database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ReferenceProcess, ReferenceProcess]]:
    options = ("--database-url", database_url, "--lease-key", secrets.token_hex(32))
    options += ("--lease-s", str(LEASE_S))
    with contextlib.ExitStack() as stack:
        # At once, on an empty database: both try to make the tables.
        made = [ReferenceProcess(tmp_path_factory.mktemp("server"), *options) for _ in range(2)]
        starts = [threading.Thread(target=stack.enter_context, args=(server,)) for server in made]
        for start in starts:
            start.start()
        for start in starts:
            start.join()
        yield made[0], made[1]


def at(server: ReferenceProcess, like: Talker) -> Talker:
    """The same daemon, calling another server."""
    twin = Talker(server, like.job_type)
    twin.worker_id, twin.instance_id = like.worker_id, like.instance_id
    return twin


def held_poll(worker: Talker) -> tuple[threading.Thread, list[tuple[str, float]]]:
    offered: list[tuple[str, float]] = []

    def poll() -> None:
        offered.extend((job["job_id"], time.monotonic()) for job in worker.poll(wait=30))

    thread = threading.Thread(target=poll)
    thread.start()
    # A worker is known from its first call on.
    while worker.worker_id not in worker.server.workers():
        pass
    return thread, offered


def test_poll_held_at_one_server_wakes_for_a_job_queued_at_the_other(
    servers: tuple[ReferenceProcess, ReferenceProcess],
) -> None:
    here, there = servers
    worker = Talker(here)
    thread, offered = held_poll(worker)
    start_s = time.monotonic()
    job_id = there.queue_training({}, job_type=worker.job_type)
    thread.join(25)
    ((found, at_s),) = offered
    assert found == job_id
    assert at_s - start_s < 2


def test_held_poll_outlives_the_connections_to_the_database(
    servers: tuple[ReferenceProcess, ReferenceProcess], database_url: str
) -> None:
    here, there = servers
    worker = Talker(here)
    thread, offered = held_poll(worker)
    with psycopg.connect(database_url, autocommit=True) as connection:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        ended = connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        assert ended.rowcount > 2
    job_id = there.queue_training({}, job_type=worker.job_type)
    thread.join(10)
    assert [found for found, _ in offered] == [job_id]


def test_job_that_is_locked_for_a_moment_is_not_passed_by_for_good(
    servers: tuple[ReferenceProcess, ReferenceProcess], database_url: str
) -> None:
    worker = Talker(servers[0])
    job_id = worker.queue()
    with psycopg.connect(database_url) as connection:
        connection.execute("SELECT 1 FROM cv_training_jobs WHERE job_id = %s FOR UPDATE", [job_id])
        thread, offered = held_poll(worker)
        connection.rollback()
    thread.join(10)
    assert [found for found, _ in offered] == [job_id]


def test_attempt_may_change_servers_at_every_step(
    servers: tuple[ReferenceProcess, ReferenceProcess],
) -> None:
    here, there = servers
    worker = Talker(here)
    twin = at(there, worker)
    job_id, claim_id, finish_id = worker.queue(), str(uuid.uuid4()), str(uuid.uuid4())
    first, again = worker.claim(job_id, claim_id).json(), twin.claim(job_id, claim_id).json()
    assert first == again
    token = first["lease_token"]
    assert twin.progress(job_id, token, 1, fraction=0.5).json() == {"directive": "continue"}
    there.cancel(job_id)
    assert worker.status(**{job_id: token})["leases"] == {job_id: "cancel"}
    for caller in (worker, twin, worker):
        assert caller.finish(job_id, token, "completed", finish_id, result={}).status_code == 200
    assert there.job(job_id)["status"] == "completed"


def test_job_of_a_dead_worker_is_offered_at_the_other_server_within_its_lease_and_a_second(
    servers: tuple[ReferenceProcess, ReferenceProcess],
) -> None:
    here, there = servers
    dead = Talker(here)
    other = Talker(there, dead.job_type)
    job_id = dead.queue()
    dead.take(job_id)
    start_s = time.monotonic()
    thread, offered = held_poll(other)
    thread.join(25)
    ((found, at_s),) = offered
    assert found == job_id
    assert LEASE_S - 0.1 < at_s - start_s <= LEASE_S + 1


def test_jobs_that_many_claim_at_both_servers_are_each_claimed_once(
    servers: tuple[ReferenceProcess, ReferenceProcess],
) -> None:
    first = Talker(servers[0])
    workers = [first, *(Talker(servers[n % 2], first.job_type) for n in range(5))]
    jobs = [first.queue() for _ in range(12)]
    won: list[str] = []

    def claim_all(worker: Talker) -> None:
        for job_id in jobs:
            answer = worker.claim(job_id)
            assert answer.status_code in (200, 409), answer.text
            if answer.status_code == 200:
                won.append(job_id)
                token = answer.json()["lease_token"]
                assert worker.finish(job_id, token, "completed", result={}).status_code == 200

    in_threads([(claim_all, worker) for worker in workers])
    assert sorted(won) == sorted(jobs)


def test_one_report_that_arrives_at_both_servers_at_once_is_accepted_twice(
    servers: tuple[ReferenceProcess, ReferenceProcess],
) -> None:
    worker = Talker(servers[0])
    callers = [worker, at(servers[1], worker)]
    for _ in range(10):
        job_id, claim_id, finish_id = worker.queue(), str(uuid.uuid4()), str(uuid.uuid4())
        answers: list[tuple[int, object]] = []
        start = threading.Barrier(2)

        def repeat(caller: Talker) -> None:
            start.wait(10)  # noqa: B023 - ended before the next round
            claimed = caller.claim(job_id, claim_id).json()  # noqa: B023
            start.wait(10)  # noqa: B023
            token = claimed["lease_token"]
            done = caller.finish(job_id, token, "completed", finish_id, result={})  # noqa: B023
            answers.append((done.status_code, claimed))  # noqa: B023

        in_threads([(repeat, caller) for caller in callers])
        assert [status for status, _ in answers] == [200, 200]
        assert answers[0][1] == answers[1][1]
        assert len(worker.server.job(job_id)["attempts"]) == 1


def test_calls_that_meet_at_the_same_jobs_do_not_wait_for_each_other_in_a_circle(
    servers: tuple[ReferenceProcess, ReferenceProcess],
) -> None:
    worker = Talker(servers[0])
    callers = [worker, at(servers[1], worker), at(servers[0], worker), at(servers[1], worker)]
    jobs = [worker.queue() for _ in range(6)]
    tokens = {job_id: worker.take(job_id) for job_id in jobs}

    def call(caller: Talker) -> None:
        for round_number in range(15):
            order = jobs if round_number % 2 else jobs[::-1]
            assert set(caller.status(**{job: tokens[job] for job in order})["leases"].values()) == {"ok"}
            for job in order[:2]:
                # A repeated number renews, which is what matters here.
                assert caller.progress(job, tokens[job], 1).status_code == 200

    in_threads([(call, caller) for caller in callers])
    for job_id in jobs:
        assert worker.finish(job_id, tokens[job_id], "completed", result={}).status_code == 200


def in_threads(calls: list[tuple[object, Talker]]) -> None:
    """Run all at once; an assertion that fails in one fails the test."""
    failed: list[BaseException] = []

    def run(call: object, worker: Talker) -> None:
        try:
            call(worker)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    threads = [threading.Thread(target=run, args=each) for each in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failed:
        raise failed[0]


def test_request_held_at_one_server_is_answered_when_the_job_ends_at_the_other(
    servers: tuple[ReferenceProcess, ReferenceProcess],
) -> None:
    here, there = servers
    admin = headers(here.admin_token)
    model = {"data": {"model_name": "yolo11", "version": "m"}, "files": {"model_file": b"model"}}
    requests.post(f"{here.url}/api/v1/cv/upload-model", headers=admin, timeout=20, **model)
    body = {"image_url": "s3://datasets/x.jpg", "model_version": "m"}
    asked = requests.post(f"{here.url}/api/v1/cv/inference", json=body, headers=admin, timeout=20).json()
    worker = Talker(there)
    token = worker.take(asked["job_id"])
    with ThreadPoolExecutor() as threads:
        look = f"{here.url}{asked['url']}?wait=30"
        answer = threads.submit(requests.get, look, headers=admin, timeout=40)
        # Until it holds the request, the server answers others; then that one is waiting for the news.
        while (
            requests.get(f"{here.url}/api/v1/cv/metrics", headers=admin, timeout=20).json()["held_answers"]
            < 1
        ):
            assert not answer.done()
        start_s = time.monotonic()
        worker.finish(asked["job_id"], token, "completed", result={"detections": []})
        assert answer.result().json()["status"] == "completed"
        assert time.monotonic() - start_s < 3
