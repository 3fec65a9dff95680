"""A lane: poll, claim, hand to a job type, while it has free slots."""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from collections.abc import Mapping

from rvmcv_worker import attempt_log, final_report
from rvmcv_worker.attempt import Services, begin_attempt, run_attempt
from rvmcv_worker.controller import (
    ControllerError,
    PollAbandonedError,
    RequestRejectedError,
    TokenRejectedError,
)
from rvmcv_worker.errors import (
    FencedError,
    InvalidJobError,
    JobError,
    UnsupportedJobError,
    WorkerUnfitError,
)
from rvmcv_worker.events import Event, event
from rvmcv_worker.job_type import JobType
from rvmcv_worker.protocol import Claim, JobOffer, MalformedJob
from rvmcv_worker.slots import Slots
from rvmcv_worker.state import Lane, RunningJob
from rvmcv_worker.tally import UNKNOWN_TYPE

#: Least seconds between two polls that led to no claim.
_POLL_GAP_S = 1.0
#: How long a lane waits at its start for RVM-Server's wishes; without them it may well ask for jobs.
_INTRODUCTION_S = 5.0
#: While free GPUs are kept for a job that needs more, seconds until it is asked whether it is still next.
_KEEP_S = 30.0
#: A job that was refused or did not complete is left alone so long, doubling up to the maximum.
_REFUSED_S, _REFUSED_MAX_S = 1.0, 300.0


class Refusals:
    """Jobs whose claim was refused, or whose attempt did not complete, and until when they are left alone.

    A server that offers such a job again and again must not keep the worker busy with nothing else.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._lock = threading.Lock()
        self._until: dict[str, tuple[float, float]] = {}

    def note(self, job_id: str) -> None:
        """Leave the job alone for twice as long as the last time, if that was not long ago."""
        now_s, longest_s = time.monotonic(), _REFUSED_MAX_S * self._scale
        with self._lock:
            self._until = {key: value for key, value in self._until.items() if now_s < value[0] + longest_s}
            _, last_s = self._until.get(job_id, (0.0, _REFUSED_S * self._scale / 2))
            wait_s = min(last_s * 2, longest_s)
            self._until[job_id] = (now_s + wait_s, wait_s)

    def holds(self, job_id: str) -> bool:
        """Whether the job is still to be left alone."""
        with self._lock:
            until_s, _ = self._until.get(job_id, (0.0, 0.0))
        return time.monotonic() < until_s


class LaneLoop(threading.Thread):
    """One lane's thread; it never waits for another lane, and a stop never waits for its held poll."""

    def __init__(
        self, lane: Lane, job_types: Mapping[str, JobType], slots: Slots, services: Services
    ) -> None:
        super().__init__(name=f"lane-{lane.value}", daemon=True)
        self.lane = lane
        self.slots = slots
        self._job_types = {name: kind for name, kind in job_types.items() if kind.lane is lane}
        self._services = services
        self._refusals = Refusals(services.settings.timing.scale)
        self._fault = f"server-{lane.value}"
        #: How many GPUs the job needs that is next, and for how long they are kept for it.
        self._next_gpus, self._keep_until_s = 1, 0.0
        self._kept = f"kept-{lane.value}"

    def run(self) -> None:
        """Poll while there are free slots and nothing forbids claiming."""
        condition, retry = self._services.condition, self._services.retry
        condition.settled.wait()
        # A wish of before this start is told with the answer to the first worker status.
        condition.introduced.wait(self._services.settings.scaled(_INTRODUCTION_S))
        backoff = retry.backoff()
        while not condition.stopping.is_set():
            mark = condition.mark()
            if not self._has_room():
                continue
            if not condition.claims(self.lane, despite="token"):
                self._keep_for_nobody()
                condition.rest(self._services.settings.scaled(_POLL_GAP_S), mark)
                continue
            if self.lane is Lane.BATCH and not self._services.storage.can_store:
                condition.rest(backoff.next_s(), mark)
                continue
            try:
                pause_s = self._poll()
            except PollAbandonedError:
                continue  # a stop or a wish of somebody's: it is looked at before the next poll
            except ControllerError as error:
                self._degraded(error)
                condition.rest(backoff.next_s(error), mark)
                retry.before_retry(error)
            except Exception:  # noqa: BLE001 - a lane that died in silence would look like an idle one
                event(Event.WORKER_FAULT).exception(
                    "a fault of the worker's own in lane {}: it tries again; please report it with "
                    "these lines",
                    self.lane.value,
                )
                condition.degrade(
                    self._fault, f"lane {self.lane.value} fails: the worker's log says why", frozenset()
                )
                condition.rest(backoff.next_s(), mark)
            else:
                backoff.reset()
                for source in ("token", self._fault):
                    if condition.recover(source):
                        event(Event.SERVER_REACHABLE).info(
                            "RVM-Server answers again: lane {} claims", self.lane.value
                        )
                if pause_s > 0:
                    condition.rest(pause_s, mark)

    def _has_room(self) -> bool:
        """Wait a moment for a place; where a job of several GPUs is next, for all that it needs."""
        if self.slots.wait(1.0, self._next_gpus):
            return True
        return self.slots.free() > 0 and time.monotonic() >= self._keep_until_s

    def _keep_for(self, offer: JobOffer, gpus: int) -> None:
        """Start no other job before this one, which is next and needs more GPUs than are free.

        RVM-Server offers it as long as it is next and has not gone elsewhere, which is asked now and then.
        """
        self._next_gpus = gpus
        self._keep_until_s = time.monotonic() + self._services.settings.scaled(_KEEP_S)
        if self._services.condition.note(
            self._kept, f"{offer.job_id} is next and needs {gpus} GPUs: what is free is kept for it"
        ):
            event(Event.JOB_WAITS_FOR_GPUS, offer.job_id).info("next, and waits until {} GPUs are free", gpus)

    def _keep_for_nobody(self) -> None:
        self._next_gpus = 1
        self._services.condition.note(self._kept, None)

    def _degraded(self, error: ControllerError) -> None:
        rejected = isinstance(error, TokenRejectedError)
        source = "token" if rejected else self._fault
        if self._services.condition.degrade(source, str(error), frozenset(Lane) if rejected else frozenset()):
            waits = f"running jobs go on, lane {self.lane.value} waits"
            if rejected:
                event(Event.TOKEN_REJECTED).error("{}, then systemctl reload rvmcv-worker; {}", error, waits)
            else:
                event(Event.SERVER_UNREACHABLE).warning(
                    "{}; {}, nothing to do unless it stays so", error, waits
                )

    def _poll(self) -> float:
        """Ask for jobs and start those that are claimed; returns how long to pause, in seconds."""
        settings = self._services.settings
        start_s = time.monotonic()
        offers = self._services.controller.offer(
            self.lane.value,
            slots=self.slots.free(),
            gpus_free=self.slots.gpus_free(),
            gpus=self.slots.gpus_fit(),
            job_types=sorted(self._job_types),
            wait_s=settings.server.poll_wait_s,
        )
        claimed, self._next_gpus = 0, 1
        for offer in offers.jobs:
            if not self._services.condition.claims(self.lane, despite="token"):
                return 0.0  # a pause, a drain or a fault came while the poll was held
            claimed += self._consider(offer)
            if self._next_gpus > 1:
                break
        else:
            self._keep_for_nobody()
        if claimed:
            return 0.0
        gap_s = settings.scaled(_POLL_GAP_S) - (time.monotonic() - start_s)
        return max(gap_s, offers.retry_after_s or 0.0)

    def _consider(self, offer: JobOffer | MalformedJob) -> bool:
        """Claim one offered job and start it; False when it was not to be had."""
        if isinstance(offer, MalformedJob):
            event(Event.JOB_MALFORMED).error(
                "RVM-Server offers a job that does not validate: {}; it is refused, tell who runs RVM-Server",
                offer.reason,
            )
            return offer.job_id is not None and self._refuse(offer.job_id, InvalidJobError(offer.reason))
        job_type = self._job_types.get(offer.job_type)
        if job_type is None:
            known = ", ".join(sorted(self._job_types))
            wrong = f"this worker's lane {self.lane.value} has no job type {offer.job_type!r}, only {known}"
            return self._refuse(offer.job_id, UnsupportedJobError(wrong))
        wanted = job_type.gpus(offer.config)
        if wanted > max(1, self.slots.gpus):
            wrong = f"config.gpus: {wanted} were asked for, this worker has {self.slots.gpus}"
            return self._refuse(offer.job_id, UnsupportedJobError(wrong))
        if self._left_alone(offer.job_id):
            return False
        if (place := self.slots.take(wanted)) is None:
            if 1 < wanted <= self.slots.gpus_fit():
                self._keep_for(offer, wanted)
            return False
        begun = False
        self._services.condition.hold(offer.job_id)
        try:
            claim = self._claim(offer.job_id, offer.job_type)
            begun = claim is not None and self._start(job_type, offer, claim, place)
        finally:
            if not begun:
                self._leave(offer.job_id, place)
        return begun

    def _start(self, job_type: JobType, offer: JobOffer, claim: Claim, place: tuple[int, ...]) -> bool:
        """Give an accepted claim its thread; where there is none to be had, the job goes back: False."""
        job = begin_attempt(self._services, job_type, offer, claim)
        thread = threading.Thread(
            target=self._work,
            args=(job, job_type, offer, claim, place),
            name=f"job-{offer.job_id}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:
            unfit = WorkerUnfitError(
                f"the worker cannot start a thread for the job ({error}): its user has too many, or memory"
                " is short; see the service's TasksMax and ulimit -u"
            )
            self._hand_back(job, unfit)
            return False
        return True

    def _hand_back(self, job: RunningJob, error: JobError) -> None:
        services = self._services
        attempt_log.tell_ended(job.job_id, error)
        try:
            services.ledger.finish(
                job.job_id, final_report.never_ran(services.settings, job.job_id, job.lease_token, error)
            )
        finally:
            job.interrupt.close()
            services.job_logs.close(job.job_id)
            services.condition.ended(job, "queued", error.code)
            services.outbox.wake()
            self._refusals.note(job.job_id)

    def _leave(self, job_id: str, place: tuple[int, ...]) -> None:
        self.slots.give_back(place)
        self._services.condition.release(job_id)

    def _left_alone(self, job_id: str) -> bool:
        return self._refusals.holds(job_id) or self._services.ledger.knows(job_id)

    def _refuse(self, job_id: str, error: JobError) -> bool:
        """Claim a job that cannot be run, only to fail it with what is wrong; True when that was done."""
        if self._left_alone(job_id):
            return False
        settings = self._services.settings
        self._services.condition.hold(job_id)
        try:
            if (claim := self._claim(job_id, "unknown")) is None:
                return False
            attempt_log.tell_ended(job_id, error)
            self._services.ledger.finish(
                job_id, final_report.never_ran(settings, job_id, claim.lease_token, error)
            )
        finally:
            self._services.condition.release(job_id)
        self._services.tally.ended(UNKNOWN_TYPE, "failed", error.code)
        self._services.outbox.wake()
        self._refusals.note(job_id)
        return True

    def _claim(self, job_id: str, job_type: str) -> Claim | None:
        """Claim under one `claim_id` until RVM-Server has said yes or no; None is no."""
        claim_id = str(uuid.uuid4())
        condition, ledger, retry = self._services.condition, self._services.ledger, self._services.retry
        ledger.begin_claim(job_id, job_type, claim_id)
        backoff = retry.backoff()
        while True:
            mark = condition.mark()
            try:
                claim = self._services.controller.claim(job_id, claim_id)
            except (FencedError, RequestRejectedError) as error:
                event(Event.JOB_CLAIM_REFUSED, job_id).log(
                    attempt_log.usual_level(self.lane), "refused: {}", error
                )
                self._services.tally.claimed(self.lane.value, granted=False)
                ledger.forget(job_id)
                self._refusals.note(job_id)
                return None
            except ControllerError as error:
                self._degraded(error)
                if condition.rest(backoff.next_s(error), mark):
                    return None  # the ledger knows the claim: the next start repeats and hands it back
                retry.before_retry(error)
            else:
                self._services.tally.claimed(self.lane.value, granted=True)
                return claim if self._note_claim(job_id, claim) else None

    def _note_claim(self, job_id: str, claim: Claim) -> bool:
        """Write an accepted claim down, however long the disk is full; False when the worker stops first."""
        condition = self._services.condition
        for delay_s in self._services.retry.delays():
            try:
                self._services.ledger.claimed(job_id, claim.attempt, claim.lease_token)
            except sqlite3.OperationalError as error:
                event(Event.JOB_CLAIM_WAITS, job_id).warning(
                    "the claim cannot be noted, tried again in {:.0f} s: {}; make room on the disk of "
                    "[worker] state_dir",
                    delay_s,
                    error,
                )
                if condition.stopping.wait(delay_s):
                    break  # the ledger knows that it was on its way: the next start hands it back
            else:
                return True
        return False

    def _work(
        self, job: RunningJob, job_type: JobType, offer: JobOffer, claim: Claim, place: tuple[int, ...]
    ) -> None:
        try:
            if run_attempt(self._services, job, job_type, offer, claim, place) != "completed":
                self._refusals.note(offer.job_id)
        finally:
            self._leave(offer.job_id, place)
