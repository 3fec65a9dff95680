"""The queue's rules, over HTTP against the running server. Time is moved by hand."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator

import pytest

from rvmcv_worker.reference.server import ReferenceServer
from tests.reference_talker import FakeClock, Talker

MINUTE_S = 60.0


@pytest.fixture(scope="module")
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="module")
def server(clock: FakeClock, database_url: str) -> Iterator[ReferenceServer]:
    with ReferenceServer(clock=clock, reap=False, database_url=database_url) as running:
        yield running


@pytest.fixture
def worker(server: ReferenceServer) -> Talker:
    # The reaper has just been here: what a test then lets expire is expired by its next tick.
    server.reap()
    return Talker(server)


def expire_leases(server: ReferenceServer, clock: FakeClock) -> None:
    """Let every training's lease run out, the reaper ticking all the while."""
    for _ in range(64):
        clock.advance(15)
        server.reap()


def names(worker: Talker, slots: int = 10) -> list[str]:
    return [job["job_id"] for job in worker.poll(slots=slots)]


def test_offer_holds_what_the_worker_needs(worker: Talker) -> None:
    job_id = worker.queue({"epochs": 3}, priority=2)
    (job,) = worker.poll()
    assert job["job_id"] == job_id
    assert job["config"] == {"epochs": 3}
    assert job["priority"] == 2
    assert job["job_type"] == worker.job_type
    assert job["created_at"].endswith("Z")


def test_nothing_to_offer_is_204(worker: Talker) -> None:
    assert worker.poll() == []


def test_jobs_come_by_age(worker: Talker, clock: FakeClock) -> None:
    queued = []
    for _ in range(4):
        queued.append(worker.queue())
        clock.advance(1)
    assert names(worker) == queued
    assert names(worker, slots=2) == queued[:2]


def test_priority_goes_before_age(worker: Talker, clock: FakeClock) -> None:
    low = worker.queue()
    clock.advance(1)
    high = worker.queue(priority=5)
    assert names(worker) == [high, low]


def test_waiting_is_worth_priority(worker: Talker, clock: FakeClock) -> None:
    patient = worker.queue(priority=0)
    clock.advance(29 * MINUTE_S)
    fresh = worker.queue(priority=3)
    assert names(worker) == [fresh, patient]
    clock.advance(2 * MINUTE_S)
    fresher = worker.queue(priority=3)
    assert names(worker) == [fresh, patient, fresher]


def test_offer_is_kept_from_other_workers_for_a_moment(
    worker: Talker, server: ReferenceServer, clock: FakeClock
) -> None:
    other = Talker(server, worker.job_type)
    job_id = worker.queue()
    assert names(worker) == [job_id]
    assert names(other) == []
    assert names(worker) == [job_id]
    clock.advance(3.1)
    assert names(other) == [job_id]


def test_job_that_needs_more_gpus_is_left_for_others(worker: Talker) -> None:
    worker.queue({"gpus": 2})
    one = worker.queue({"gpus": 1})
    assert [job["job_id"] for job in worker.poll(slots=5)] == [one]
    assert len(worker.poll(slots=5, gpus_free=2)) == 2


def test_a_job_that_has_to_wait_for_gpus_is_offered_alone_once_it_is_next(
    worker: Talker, server: ReferenceServer, clock: FakeClock
) -> None:
    first = worker.queue({"gpus": 1})
    clock.advance(1)
    both = worker.queue({"gpus": 2})
    clock.advance(1)
    last = worker.queue({"gpus": 1})

    def offered(**poll: int) -> list[str]:
        return [job["job_id"] for job in worker.poll(**{"slots": 3, "gpus_free": 1, "gpus": 2, **poll})]

    assert offered() == [first]
    assert offered(gpus_free=2) == [first, both, last]
    worker.take(first)
    assert offered() == [both]
    assert offered(slots=1, gpus_free=0) == [both]
    # A worker that has no second one, or does not keep any free, goes on with what it can run.
    assert offered(gpus=1) == offered(gpus=0) == [last]
    clock.advance(3.1)
    assert names(Talker(server, worker.job_type)) == [last]
    clock.advance(3.1)
    urgent = worker.queue({}, priority=5)
    assert offered() == [urgent]


@pytest.mark.parametrize("gpus", ["2", True, 0, 2.5, None, [2]])
def test_what_is_no_count_of_gpus_is_for_the_worker_to_refuse(worker: Talker, gpus: object) -> None:
    job_id = worker.queue({"gpus": gpus})
    assert names(worker) == [job_id]
    assert worker.server.job(job_id)["waits_for"] is None


def test_a_job_for_which_no_worker_is_large_enough_says_so(
    worker: Talker, server: ReferenceServer, clock: FakeClock
) -> None:
    clock.advance(1000)  # the workers of other tests are away
    job_id = worker.queue({"gpus": 3})
    assert server.job(worker.queue())["waits_for"] is None
    wants = "it asks for 3 GPUs of one worker, and no worker has 3"

    def why() -> object:
        return server.job(job_id)["waits_for"]

    assert why() == wants
    worker.status()
    assert why() == f"{wants}: the largest is {worker.worker_id} with none"
    other = Talker(server, worker.job_type)
    gpu = {"index": 0, "name": "a GPU", "memory_total_mb": 1}
    other.status_fields = {"gpus": [gpu]}
    other.status()
    assert why() == f"{wants}: the largest is {other.worker_id} with 1"
    other.status_fields = {"gpus": [gpu] * 3}
    other.status()
    assert why() is None, "it waits for its turn"
    clock.advance(60)
    worker.status()
    away = f"; {other.worker_id}, which had 3, was last seen 60 s ago"
    assert why() == f"{wants}: the largest is {worker.worker_id} with none{away}"
    other.status()
    other.take(job_id)
    clock.advance(60)
    assert why() is None, "it does not wait"


def test_held_poll_wakes_for_a_new_job(worker: Talker) -> None:
    offered: list[str] = []
    poll = threading.Thread(target=lambda: offered.extend(job["job_id"] for job in worker.poll(wait=30)))
    poll.start()
    job_id = worker.queue()
    poll.join(20)
    assert offered == [job_id]


def test_repeated_claim_gets_its_old_answer(worker: Talker) -> None:
    job_id, claim_id = worker.queue(), str(uuid.uuid4())
    first, second = worker.claim(job_id, claim_id), worker.claim(job_id, claim_id)
    assert first.status_code == second.status_code == 200
    assert first.json() == second.json()
    assert first.json()["attempt"] == 1
    assert len(worker.server.job(job_id)["attempts"]) == 1


def test_repeated_claim_of_an_attempt_that_is_over_is_ended(worker: Talker) -> None:
    job_id, claim_id = worker.queue(), str(uuid.uuid4())
    token = worker.claim(job_id, claim_id).json()["lease_token"]
    worker.hand_back(job_id, token, "worker_stopped")
    again = worker.claim(job_id, claim_id)
    assert (again.status_code, again.json()["reason"]) == (409, "ended")
    assert len(worker.server.job(job_id)["attempts"]) == 1


def test_refused_claims_say_why(worker: Talker, server: ReferenceServer) -> None:
    other = Talker(server, worker.job_type)
    job_id = worker.queue()
    token = worker.take(job_id)
    taken = other.claim(job_id)
    assert (taken.status_code, taken.json()["reason"]) == (409, "taken")
    worker.finish(job_id, token, "completed", result={})
    assert other.claim(job_id).json()["reason"] == "finished"
    cancelled = worker.queue()
    server.cancel(cancelled)
    assert other.claim(cancelled).json()["reason"] == "cancelled"
    unknown = other.claim("no_such_job")
    assert (unknown.status_code, unknown.json()["reason"]) == (404, "unknown_job")


def test_two_workers_that_claim_at_once_share_nothing(worker: Talker, server: ReferenceServer) -> None:
    talkers = [worker, *(Talker(server, worker.job_type) for _ in range(3))]
    jobs = [worker.queue() for _ in range(8)]
    won: list[tuple[str, str]] = []

    def claim_all(talker: Talker) -> None:
        won.extend((job, talker.worker_id) for job in jobs if talker.claim(job).status_code == 200)

    threads = [threading.Thread(target=claim_all, args=(talker,)) for talker in talkers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(job for job, _ in won) == sorted(jobs)


def test_progress_is_merged_and_repeats_are_ignored(worker: Talker) -> None:
    job_id = worker.queue()
    token = worker.take(job_id)
    epochs = [{"epoch": 1, "box": 0.5}, {"epoch": 2, "box": None}]
    first = worker.progress(job_id, token, 1, fraction=0.2, phase="train", epoch=2, history=epochs)
    assert first.json() == {"directive": "continue"}
    worker.progress(job_id, token, 3, fraction=0.3, history=[{"epoch": 3, "box": 0.3}])
    late = worker.progress(job_id, token, 2, fraction=0.25, history=[{"epoch": 9}])
    assert late.status_code == 200
    job = worker.server.job(job_id)
    assert job["fraction"] == 0.3
    assert [entry["epoch"] for entry in job["history"]] == [1, 2, 3]


def test_checkpoint_is_what_the_next_attempt_resumes_from(worker: Talker) -> None:
    job_id = worker.queue()
    token = worker.take(job_id)
    checkpoint = {"path": "s3://artifacts/x/attempt-1/last.pt", "sha256": "a" * 64, "epoch": 7}
    worker.progress(job_id, token, 1, checkpoint=checkpoint)
    worker.hand_back(job_id, token, "worker_stopped")
    answer = worker.claim(job_id).json()
    assert answer["attempt"] == 2
    assert answer["resume"] == checkpoint


def test_repeated_finish_gets_the_same_answer(worker: Talker) -> None:
    job_id, finish_id = worker.queue(), str(uuid.uuid4())
    token = worker.take(job_id)
    for _ in range(2):
        answer = worker.finish(job_id, token, "completed", finish_id, result={"n": 1}, timings={"run": 1.5})
        assert (answer.status_code, answer.json()) == (200, {"accepted": True})
    other = worker.finish(job_id, token, "failed", error={"code": "internal", "message": "m"})
    assert (other.status_code, other.json()["reason"]) == (409, "finished")
    job = worker.server.job(job_id)
    assert (job["status"], job["result"], job["timings"]) == ("completed", {"n": 1}, {"run": 1.5})


def test_finish_id_of_another_job_is_refused(worker: Talker) -> None:
    one, two, finish_id = worker.queue(), worker.queue(), str(uuid.uuid4())
    token_one, token_two = worker.take(one), worker.take(two)
    worker.finish(one, token_one, "completed", finish_id, result={})
    stolen = worker.finish(two, token_two, "completed", finish_id, result={})
    assert stolen.status_code == 409
    assert worker.server.job(two)["status"] == "processing"


def test_wrong_token_writes_nothing(worker: Talker) -> None:
    job_id = worker.queue()
    worker.take(job_id)
    for answer in (
        worker.progress(job_id, "f" * 64, 1, fraction=0.9),
        worker.finish(job_id, "f" * 64, "completed", result={}),
    ):
        assert (answer.status_code, answer.json()["reason"]) == (409, "taken")
    assert worker.server.job(job_id)["status"] == "processing"
    assert worker.server.job(job_id)["progress"] is None


def test_expired_lease_is_offered_elsewhere_and_its_holder_fenced(
    worker: Talker, server: ReferenceServer, clock: FakeClock
) -> None:
    other = Talker(server, worker.job_type)
    job_id = worker.queue()
    token = worker.take(job_id)
    expire_leases(server, clock)
    assert names(worker) == []  # it is still at work
    assert names(other) == [job_id]
    new_token = other.take(job_id)
    late = worker.progress(job_id, token, 1, fraction=0.5)
    assert (late.status_code, late.json()["reason"]) == (409, "taken")
    assert worker.finish(job_id, token, "completed", result={}).status_code == 409
    assert worker.status(**{job_id: token})["leases"] == {job_id: "lost"}
    assert other.finish(job_id, new_token, "completed", result={"by": "other"}).status_code == 200
    assert server.job(job_id)["result"] == {"by": "other"}


def test_expired_lease_that_nobody_took_is_still_its_holders(
    worker: Talker, server: ReferenceServer, clock: FakeClock
) -> None:
    job_id = worker.queue()
    token = worker.take(job_id)
    expire_leases(server, clock)
    assert server.job(job_id)["status"] == "queued"
    assert worker.progress(job_id, token, 1, fraction=0.5).json() == {"directive": "continue"}
    job = server.job(job_id)
    assert job["status"] == "processing"
    assert [attempt["counts"] for attempt in job["attempts"]] == [False]
    expire_leases(server, clock)
    assert worker.finish(job_id, token, "completed", result={}).status_code == 200


def test_worker_status_renews_leases(worker: Talker, server: ReferenceServer, clock: FakeClock) -> None:
    job_id = worker.queue()
    token = worker.take(job_id)
    for _ in range(10):
        clock.advance(800)
        orders = worker.status(**{job_id: token})
        assert orders["leases"] == {job_id: "ok"}
    assert orders["desired_state"] == "run"
    assert orders["interval_s"] == {"idle": 10, "busy": 3}
    server.set_desired_state(worker.worker_id, "drain")
    assert worker.status()["desired_state"] == "drain"


def test_reaper_that_was_away_spares_every_lease_once(
    worker: Talker, server: ReferenceServer, clock: FakeClock
) -> None:
    job_id = worker.queue()
    worker.take(job_id)
    clock.advance(3600)
    server.reap()
    assert server.job(job_id)["status"] == "processing"
    expire_leases(server, clock)
    assert server.job(job_id)["status"] == "queued"


def test_new_daemon_frees_the_jobs_of_the_old_one_at_once(worker: Talker, server: ReferenceServer) -> None:
    job_id, claim_id = worker.queue(), str(uuid.uuid4())
    token = worker.claim(job_id, claim_id).json()["lease_token"]
    worker.restart()
    assert names(worker) == [job_id]
    assert worker.progress(job_id, token, 1).json()["reason"] == "ended"
    assert server.job(job_id)["attempts"][0]["lapsed_as"] == "new_instance"
    assert worker.claim(job_id).json()["attempt"] == 2
    assert worker.claim(job_id, claim_id).json()["reason"] == "ended"


@pytest.mark.parametrize(("code", "counts"), [("worker_stopped", False), ("worker_died", True)])
def test_claim_whose_answer_a_dead_daemon_never_saw_is_handed_back_by_the_next(
    worker: Talker, server: ReferenceServer, code: str, counts: bool
) -> None:
    job_id, claim_id = worker.queue(), str(uuid.uuid4())
    lost = worker.claim(job_id, claim_id).json()
    worker.restart()
    repeated = worker.claim(job_id, claim_id)
    assert (repeated.status_code, repeated.json()) == (200, lost)
    token = repeated.json()["lease_token"]
    assert worker.progress(job_id, token, 1).json()["reason"] == "ended"
    assert worker.hand_back(job_id, token, code).status_code == 200
    (attempt,) = server.job(job_id)["attempts"]
    assert (attempt["ended_as"], attempt["counts"], attempt["error"]["code"]) == ("queued", counts, code)
    assert worker.claim(job_id, claim_id).json()["reason"] == "ended"
    assert names(worker) == [job_id]


def test_claim_that_a_displaced_daemon_repeats_is_ended(worker: Talker) -> None:
    job_id, claim_id = worker.queue(), str(uuid.uuid4())
    worker.claim(job_id, claim_id)
    old = worker.instance_id
    worker.restart()
    worker.status()
    assert worker.claim(job_id, claim_id, instance_id=old).json()["reason"] == "ended"


def test_claim_id_of_another_worker_or_job_is_ended(worker: Talker, server: ReferenceServer) -> None:
    job_id, second, claim_id = worker.queue(), worker.queue(), str(uuid.uuid4())
    worker.claim(job_id, claim_id)
    assert Talker(server, worker.job_type).claim(job_id, claim_id).json()["reason"] == "ended"
    assert worker.claim(second, claim_id).json()["reason"] == "ended"
    assert server.job(second)["status"] == "queued"


def test_result_that_waited_in_the_outbox_of_a_restarted_daemon_still_counts(worker: Talker) -> None:
    job_id = worker.queue()
    token = worker.take(job_id)
    worker.restart()
    worker.status()
    assert worker.finish(job_id, token, "completed", result={"kept": True}).status_code == 200
    assert worker.server.job(job_id)["result"] == {"kept": True}


def test_old_daemon_that_comes_back_gets_nothing_and_is_reported(
    worker: Talker, server: ReferenceServer
) -> None:
    old = worker.instance_id
    worker.poll()
    worker.restart()
    job_id = worker.queue()
    token = worker.take(job_id)
    worker.instance_id, current = old, worker.instance_id
    second = worker.queue()
    assert names(worker) == []
    assert worker.claim(second).json()["reason"] == "ended"
    worker.instance_id = current
    assert worker.progress(job_id, token, 1).status_code == 200
    (shown,) = [each for each in server.workers() if each["worker_id"] == worker.worker_id]
    assert shown["alternations"] == 2


def test_cancel_of_a_queued_job_is_final(worker: Talker, server: ReferenceServer) -> None:
    job_id = worker.queue()
    assert server.cancel(job_id) == "cancelled"
    assert names(worker) == []


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        ("cancelled", {}),
        ("completed", {"result": {"won": True}}),
        ("failed", {"error": {"code": "dataset_invalid", "message": "line 3"}}),
    ],
)
def test_cancel_of_a_running_job_leaves_the_word_to_the_first_finish(
    worker: Talker, server: ReferenceServer, status: str, fields: dict[str, object]
) -> None:
    job_id = worker.queue()
    token = worker.take(job_id)
    assert server.cancel(job_id) == "cancelling"
    assert worker.progress(job_id, token, 1, phase="upload").json() == {"directive": "cancel"}
    assert worker.status(**{job_id: token})["leases"] == {job_id: "cancel"}
    assert worker.finish(job_id, token, status, **fields).status_code == 200
    assert server.job(job_id)["status"] == status


def test_hand_back_of_a_job_that_is_being_cancelled_cancels_it(
    worker: Talker, server: ReferenceServer
) -> None:
    job_id = worker.queue()
    token = worker.take(job_id)
    server.cancel(job_id)
    assert worker.hand_back(job_id, token, "worker_stopped").status_code == 200
    assert server.job(job_id)["status"] == "cancelled"


def test_lease_that_expires_while_cancelling_cancels_the_job(
    worker: Talker, server: ReferenceServer, clock: FakeClock
) -> None:
    job_id = worker.queue()
    token = worker.take(job_id)
    server.cancel(job_id)
    expire_leases(server, clock)
    assert server.job(job_id)["status"] == "cancelled"
    assert worker.finish(job_id, token, "completed", result={}).json()["reason"] == "cancelled"


def test_hand_back_waits_for_its_time(worker: Talker, clock: FakeClock) -> None:
    job_id = worker.queue()
    worker.hand_back(job_id, worker.take(job_id), "dataset_unavailable", retry_after_s=40)
    assert names(worker) == []
    clock.advance(39)
    assert names(worker) == []
    clock.advance(2)
    assert names(worker) == [job_id]
    worker.hand_back(job_id, worker.take(job_id), "dataset_unavailable", retry_after_s=40)
    clock.advance(79)
    assert names(worker) == []
    clock.advance(2)
    assert names(worker) == [job_id]


@pytest.mark.parametrize("code", ["job_crashed", "internal", "worker_died"])
def test_third_counted_hand_back_poisons_the_job(worker: Talker, clock: FakeClock, code: str) -> None:
    job_id = worker.queue()
    for _ in range(3):
        clock.advance(3601)
        assert names(worker) == [job_id]
        worker.hand_back(job_id, worker.take(job_id), code)
    assert worker.server.job(job_id)["status"] == "queued"
    clock.advance(3601)
    assert names(worker) == []
    job = worker.server.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", code)
    assert "poisoned" in job["error"]["message"]
    assert len(job["error"]["details"]["attempts"]) == 3


def test_poisoned_job_cannot_be_claimed_past_the_offers(worker: Talker) -> None:
    job_id = worker.queue()
    for _ in range(3):
        worker.hand_back(job_id, worker.take(job_id), "worker_died")
    assert worker.claim(job_id).json()["reason"] == "finished"
    assert worker.server.job(job_id)["status"] == "failed"


def test_expired_leases_poison_but_not_before_the_job_would_be_offered(
    worker: Talker, server: ReferenceServer, clock: FakeClock
) -> None:
    other = Talker(server, worker.job_type)
    job_id = worker.queue()
    for holder in (worker, other, worker):
        token = holder.take(job_id)
        expire_leases(server, clock)
    late = worker.finish(job_id, token, "completed", result={"late": True})
    assert late.status_code == 200
    assert server.job(job_id)["status"] == "completed"


def test_planned_stops_never_poison(worker: Talker) -> None:
    job_id = worker.queue()
    for attempt in range(1, 13):
        answer = worker.claim(job_id).json()
        assert answer["attempt"] == attempt
        worker.hand_back(job_id, answer["lease_token"], "worker_stopped")
    assert names(worker) == [job_id]


def test_too_many_hand_backs_fail_the_job(worker: Talker, clock: FakeClock) -> None:
    job_id = worker.queue()
    for _ in range(11):
        clock.advance(3601)
        assert names(worker) == [job_id]
        worker.hand_back(job_id, worker.take(job_id), "upload_failed")
    clock.advance(3601)
    assert names(worker) == []
    job = worker.server.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "upload_failed")
