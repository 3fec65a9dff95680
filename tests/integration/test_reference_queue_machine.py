"""The queue's promises under any order of calls: drawn by Hypothesis, checked after every step.

`--hypothesis-profile=chaos` draws twenty times as much; `--hypothesis-seed=N` draws the same again.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from rvmcv_worker.reference import wire
from rvmcv_worker.reference.database import Database
from rvmcv_worker.reference.jobs import JOB_TABLES
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.settings import Settings, Timing
from rvmcv_worker.reference.states import FINAL
from rvmcv_worker.reference.tables import Attempt, Base
from rvmcv_worker.reference.turn import FencedError, hash_token
from rvmcv_worker.reference.wakeup import Wakeup
from tests.reference_talker import FakeClock

pytestmark = pytest.mark.slow

LEASE_KEY = bytes(32)
WORKERS = ("anna", "bert")
JOB_TYPES = ("yolo11", "inference")
#: Shorter than in production, so that few ticks of the reaper lie between.
SETTINGS = Settings(
    timing=Timing(lease_train_s=45.0, lease_infer_s=20.0, hand_back_delay_s=5.0, hand_back_delay_limit_s=60.0)
)
TICK_S = 15.0
FINAL_STATES = {status.value for status in FINAL}
#: Within and beyond: an offer's hold, an inference's lease, an outage, a training's lease, a delay.
PAUSES_S = (0.4, 3.5, 21.0, 31.0, 46.0, 46.0, 61.0)

#: Which of the things that there are, the newest first.
NTH = st.integers(0, 7)

#: One request in four does not arrive, or not yet.
LOST = st.sampled_from([False, False, False, True])

Thing = TypeVar("Thing")
Request = wire.Claim | wire.ProgressReport | wire.Finish | wire.WorkerStatus | wire.Offer


@dataclass(frozen=True)
class Snapshot:
    """What the database holds of one job."""

    row: dict[str, Any]
    attempts: tuple[dict[str, Any], ...]

    @property
    def status(self) -> str:
        return str(self.row["status"])

    @property
    def open(self) -> list[dict[str, Any]]:
        return [attempt for attempt in self.attempts if attempt["ended_as"] is None]


@dataclass
class Known:
    """What has been answered for a job so far."""

    accepted: dict[str, str] = field(default_factory=dict)  # finish_id to status
    tokens: dict[str, tuple[str, int]] = field(default_factory=dict)  # claim_id to token and attempt


class QueueMachine(RuleBasedStateMachine):
    """Some workers with late, lost and repeated requests, an admin, a clock, and a server that restarts."""

    def __init__(self, database_url: str) -> None:
        super().__init__()
        self._url = database_url
        self._clock = FakeClock()
        self._known: dict[str, Known] = {}
        self._tokens: list[tuple[str, str]] = []  # (job, token) of each accepted claim
        self._requests: list[Request] = []
        self._instances = {worker: [uuid.uuid4()] for worker in WORKERS}
        #: As the server has met them: the newest is the current one.
        self._met: dict[str, list[uuid.UUID]] = {worker: [] for worker in WORKERS}
        self._seq = 0
        self._before: dict[str, Snapshot] = {}
        self._start_server()
        with self._database.write() as session:
            for table in reversed(Base.metadata.sorted_tables):
                session.execute(table.delete())

    # The server ----------------------------------------------------------------------------------

    def _start_server(self) -> None:
        self._database = Database(self._url, self._clock)
        self._queue = Queue(self._database, SETTINGS, Wakeup(), LEASE_KEY)

    @rule()
    def restart_server(self) -> None:
        self._database.close()
        self._start_server()

    @rule(pause_s=st.sampled_from(PAUSES_S), ticks=st.booleans())
    def wait(self, pause_s: float, ticks: bool) -> None:
        """Let time pass, with the reaper at work or away."""
        left_s = pause_s
        while ticks and left_s > TICK_S:
            self._clock.advance(TICK_S)
            left_s -= TICK_S
            self._queue.reap()
        self._clock.advance(left_s)
        if ticks:
            self._queue.reap()

    # Admins --------------------------------------------------------------------------------------

    @initialize()
    def first_job(self) -> None:
        self.queue_job("yolo11", 0)

    @rule(job_type=st.sampled_from(JOB_TYPES), priority=st.integers(0, 3))
    @precondition(lambda self: len(self._known) < 3)
    def queue_job(self, job_type: str, priority: int) -> None:
        job_id = self._queue.enqueue(job_type, {}, priority=priority)
        self._known[job_id] = Known()

    @rule(nth=NTH)
    def cancel(self, nth: int) -> None:
        job = self._job(nth)
        before = self._look()[job].status
        after = self._queue.cancel(job)
        assert after is not None
        expected = {"queued": "cancelled", "processing": "cancelling"}.get(before, before)
        assert after.value == expected

    # Workers -------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(WORKERS))
    def start_daemon_anew(self, worker: str) -> None:
        self._instances[worker].append(uuid.uuid4())
        self.show_status(worker, 0, False)

    @rule(worker=st.sampled_from(WORKERS), nth=NTH, lost=LOST, displaced=LOST)
    def claim(self, worker: str, nth: int, lost: bool, displaced: bool) -> None:
        """Claim any job, offered or not; a lost request may still be delivered later."""
        self._claim(
            worker, self._job(nth), lost, -2 if displaced and len(self._instances[worker]) > 1 else -1
        )

    def _claim(self, worker: str, job: str, lost: bool, instance: int = -1) -> None:
        request = wire.Claim(
            event="claim",
            job_id=job,
            worker_id=worker,
            instance_id=self._instances[worker][instance],
            claim_id=uuid.uuid4(),
        )
        self._send(request, lost)

    @rule(nth=NTH)
    @precondition(lambda self: self._claims())
    def repeat_claim_after_a_crash(self, nth: int) -> None:
        """The next daemon repeats what its predecessor had asked for."""
        request = self._nth(self._claims(), nth)
        current = self._instances[request.worker_id][-1]
        self._send(request.model_copy(update={"instance_id": current}), False)

    @rule(nth=NTH, lost=LOST)
    @precondition(lambda self: self._tokens)
    def progress(self, nth: int, lost: bool) -> None:
        job, token = self._nth(self._tokens, nth)
        self._seq += 1
        request = wire.ProgressReport(
            event="progress",
            job_id=job,
            lease_token=token,
            seq=self._seq,
            progress=wire.Progress(fraction=0.5, history=[{"epoch": self._seq}]),
        )
        self._send(request, lost)

    @rule(
        nth=NTH,
        status=st.sampled_from(["queued", "queued", "queued", "completed", "failed", "cancelled"]),
        code=st.sampled_from(["worker_died", "worker_stopped", "job_crashed", "dataset_unavailable"]),
        lost=LOST,
    )
    @precondition(lambda self: self._tokens)
    def finish(self, nth: int, status: Any, code: str, lost: bool) -> None:
        job, token = self._nth(self._tokens, nth)
        finish_id = uuid.uuid4()
        request = wire.Finish(
            event="finish",
            job_id=job,
            lease_token=token,
            finish_id=finish_id,
            status=status,
            result={"of": str(finish_id)} if status == "completed" else None,
            error=wire.Fault(code=code, message="m") if status in ("failed", "queued") else None,
        )
        self._send(request, lost)

    @rule(worker=st.sampled_from(WORKERS), leases=st.integers(0, 4), lost=LOST)
    def show_status(self, worker: str, leases: int, lost: bool) -> None:
        holders = self._tokens[-leases:] if leases else []
        request = wire.WorkerStatus(
            worker_id=worker,
            instance_id=self._instances[worker][-1],
            version="1",
            state="ready",
            claims=wire.Claims(train=True, infer=True, batch=True),
            uptime_s=1,
            sandbox="none",
            host=wire.Host(),
            jobs=wire.JobCounts(running=0, completed=0, failed=0, cancelled=0),
            leases=[wire.Lease(job_id=job, lease_token=token) for job, token in holders],
        )
        self._send(request, lost)

    @rule(worker=st.sampled_from(WORKERS), slots=st.integers(1, 3), lost=LOST)
    def poll(self, worker: str, slots: int, lost: bool) -> None:
        request = wire.Offer(
            worker_id=worker,
            instance_id=self._instances[worker][-1],
            lane="train",
            job_types=",".join(JOB_TYPES),
            slots=slots,
        )
        self._send(request, lost)

    @rule(nth=NTH)
    @precondition(lambda self: self._requests)
    def deliver_late_or_again(self, nth: int) -> None:
        self._deliver(self._nth(self._requests, nth))

    def _send(self, request: Request, lost: bool) -> None:
        self._requests.append(request)
        if not lost:
            self._deliver(request)

    def _claims(self) -> list[wire.Claim]:
        return [request for request in self._requests if isinstance(request, wire.Claim)]

    def _job(self, nth: int) -> str:
        return self._nth(list(self._known), nth)

    @staticmethod
    def _nth(things: list[Thing], nth: int) -> Thing:
        return things[-1 - nth % len(things)]

    # What each answer must be --------------------------------------------------------------------

    def _deliver(self, request: Request) -> None:
        before = self._look()
        if isinstance(request, wire.Claim | wire.WorkerStatus | wire.Offer):
            self._meet(request.worker_id, request.instance_id)
        handlers: dict[type[Request], Callable[[Any, dict[str, Snapshot]], None]] = {
            wire.Claim: self._deliver_claim,
            wire.ProgressReport: self._deliver_progress,
            wire.Finish: self._deliver_finish,
            wire.WorkerStatus: self._deliver_status,
            wire.Offer: self._deliver_poll,
        }
        handlers[type(request)](request, before)
        if isinstance(request, wire.Claim | wire.WorkerStatus | wire.Offer):
            self._check_that_only_the_current_instance_holds(request.worker_id)

    def _meet(self, worker: str, instance_id: uuid.UUID) -> None:
        if instance_id not in self._met[worker]:
            self._met[worker].append(instance_id)

    def _is_current(self, request: wire.Claim | wire.Offer) -> bool:
        return request.instance_id == self._met[request.worker_id][-1]

    def _deliver_claim(self, request: wire.Claim, before: dict[str, Snapshot]) -> None:
        known, claim_id = self._known[request.job_id], str(request.claim_id)
        try:
            answer = self._queue.claim(request)
        except FencedError:
            return
        assert self._is_current(request)
        if claim_id in known.tokens:
            assert known.tokens[claim_id] == (answer.lease_token, answer.attempt)
            return
        assert before[request.job_id].status not in FINAL_STATES
        counted = sum(each["counts"] for each in self._look()[request.job_id].attempts)
        assert counted < SETTINGS.poison_limit, "a poisoned job was given out"
        assert answer.attempt == len(before[request.job_id].attempts) + 1
        assert answer.lease_token not in {token for token, _ in known.tokens.values()}
        known.tokens[claim_id] = (answer.lease_token, answer.attempt)
        self._tokens.append((request.job_id, answer.lease_token))

    def _deliver_progress(self, request: wire.ProgressReport, before: dict[str, Snapshot]) -> None:
        try:
            self._queue.progress(request)
        except FencedError:
            assert self._look() == before
            return
        assert self._holds(before[request.job_id], request.lease_token)
        (attempt,) = self._look()[request.job_id].open
        assert attempt["lapsed_as"] is None
        assert attempt["lease_until"] == self._clock.now + attempt["lease_s"]

    def _deliver_finish(self, request: wire.Finish, before: dict[str, Snapshot]) -> None:
        known, finish_id = self._known[request.job_id], str(request.finish_id)
        try:
            self._queue.finish(request)
        except FencedError:
            assert finish_id not in known.accepted
            assert self._look() == before
            return
        if finish_id in known.accepted:
            assert self._look() == before
            return
        assert self._holds(before[request.job_id], request.lease_token)
        known.accepted[finish_id] = request.status
        after = self._look()[request.job_id]
        if request.status == "queued":
            expected = {"cancelling": "cancelled"}.get(before[request.job_id].status, "queued")
        else:
            expected = request.status
            assert after.row["result"] == request.result
        assert after.status == expected

    def _deliver_status(self, request: wire.WorkerStatus, _before: dict[str, Snapshot]) -> None:
        orders = self._queue.worker_status(request)
        after = self._look()
        for lease in request.leases:
            held = any(
                self._holds(after[lease.job_id], each.lease_token)
                and after[lease.job_id].status in ("processing", "cancelling")
                for each in request.leases
                if each.job_id == lease.job_id
            )
            assert held or orders.leases[lease.job_id] == "lost"
            if orders.leases[lease.job_id] != "lost":
                assert (orders.leases[lease.job_id] == "cancel") == (
                    after[lease.job_id].status == "cancelling"
                )

    def _deliver_poll(self, request: wire.Offer, before: dict[str, Snapshot]) -> None:
        offered, due_s = self._queue.offer(request)
        assert not offered or self._is_current(request)
        assert len(offered) <= request.slots
        assert len({job.job_id for job in offered}) == len(offered)
        assert due_s is None or due_s > 0
        after = self._look()
        for job in offered:
            assert after[job.job_id].status == "queued"
            assert after[job.job_id].row["not_before"] <= self._clock.now
            assert after[job.job_id].row["offered_to"] == request.worker_id
        ranks = [job.priority - before[job.job_id].row["created_at"] / 600 for job in offered]
        assert ranks == sorted(ranks, reverse=True)

    @staticmethod
    def _holds(job: Snapshot, token: str) -> bool:
        return [attempt["lease_token_hash"] for attempt in job.open] == [hash_token(token)]

    def _check_that_only_the_current_instance_holds(self, worker: str) -> None:
        current = str(self._met[worker][-1])
        for job in self._look().values():
            for attempt in job.open:
                if attempt["worker_id"] == worker and attempt["instance_id"] != current:
                    assert attempt["lapsed_as"] == "new_instance"

    # What must hold at any time ------------------------------------------------------------------

    def _look(self) -> dict[str, Snapshot]:
        with self._queue.look() as turn:
            attempts = (
                turn.session.execute(select(Attempt.__table__).order_by(Attempt.attempt)).mappings().all()
            )
            rows = [
                row
                for table in JOB_TABLES
                for row in turn.session.execute(select(table.__table__)).mappings()
            ]
        return {
            row["job_id"]: Snapshot(
                dict(row), tuple(dict(each) for each in attempts if each["job_id"] == row["job_id"])
            )
            for row in rows
        }

    @invariant()
    def promises(self) -> None:
        now = self._look()
        assert now.keys() == self._known.keys(), "a job is lost"
        for job_id, job in now.items():
            self._check_job(job, self._known[job_id])
            if job_id in self._before:
                self._check_change(self._before[job_id], job)
        self._before = now

    @staticmethod
    def _check_job(job: Snapshot, known: Known) -> None:
        assert [each["attempt"] for each in job.attempts] == list(range(1, job.row["attempt"] + 1))
        assert job.open in ([], [*job.attempts[-1:]]), "an attempt that is not the newest may still write"
        held = [each for each in job.open if each["lapsed_as"] is None]
        assert len(held) == (job.status in ("processing", "cancelling")), (
            "neither held, nor queued, nor final"
        )
        assert not job.open or job.status not in FINAL_STATES
        assert all(each["counts"] == (each["lapsed_as"] is not None) for each in job.open)
        assert (job.row["finished_at"] is not None) == (job.status in FINAL_STATES)
        assert sum(each["counts"] for each in job.attempts) <= SETTINGS.poison_limit
        assert sum(status != "queued" for status in known.accepted.values()) <= 1, "two results accepted"
        accepted = {each["finish_id"] for each in job.attempts} - {None}
        assert accepted == set(known.accepted)
        if job.status == "completed":
            (decided,) = (key for key, status in known.accepted.items() if status == "completed")
            assert job.row["result"] == {"of": decided}

    @staticmethod
    def _check_change(before: Snapshot, after: Snapshot) -> None:
        if before.status in FINAL_STATES:
            assert after == before, "a job that is over has changed"
        for was, now in zip(before.attempts, after.attempts, strict=False):
            assert (was["claim_id"], was["lease_token_hash"]) == (now["claim_id"], now["lease_token_hash"])
            if was["ended_as"] is not None:
                assert now == was, "an attempt that is over has changed"
        assert len(after.attempts) - len(before.attempts) in (0, 1)

    def teardown(self) -> None:
        """Let a diligent worker come: every job must reach its end, whatever was done to it."""
        if not self._before:
            return
        self._instances = {worker: [uuid.uuid4()] for worker in WORKERS}
        for _ in range(3):
            self.wait(61.0, True)
            for worker in WORKERS:
                self._end_what_is_offered(worker)
        self.promises()
        assert {job.status for job in self._look().values()} <= FINAL_STATES
        self._database.close()

    def _end_what_is_offered(self, worker: str) -> None:
        poll = wire.Offer(
            worker_id=worker,
            instance_id=self._instances[worker][-1],
            lane="train",
            job_types=",".join(JOB_TYPES),
            slots=10,
        )
        self._meet(worker, poll.instance_id)
        for job in self._queue.offer(poll)[0]:
            self._claim(worker, job.job_id, False)
            self.finish(0, "completed", "", False)


def test_any_order_of_calls_keeps_the_promises(database_url: str) -> None:
    run_state_machine_as_test(
        lambda: QueueMachine(database_url),
        settings=settings(
            max_examples=settings().max_examples * 6 // 10,
            deadline=None,
            stateful_step_count=40,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
