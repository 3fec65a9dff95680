"""Settles what an attempt left that nobody works on any more: before a start claims anything, and later.

First what needs nobody (`clear`), then what needs RVM-Server or storage, all in a thread of its own
(`Settlement`): neither the main loop nor systemd waits for a disk or a network.
"""

from __future__ import annotations

import sqlite3
import threading
import time

from rvmcv_worker import attempt_log, checkpoints, final_report, instance, workspace
from rvmcv_worker.attempt import Services, checkpoint_put
from rvmcv_worker.controller import ControllerError, RequestRejectedError
from rvmcv_worker.errors import FencedError, InternalError, JobError, WorkerDiedError, WorkerStoppedError
from rvmcv_worker.events import Event, event
from rvmcv_worker.ledger import ClaimRow, ClaimState
from rvmcv_worker.process_tree import kill_marked
from rvmcv_worker.protocol import Checkpoint, to_wire
from rvmcv_worker.state import SETTLEMENT
from rvmcv_worker.workspace import Workspace

#: How long the hand-backs, with their checkpoints, may take to be RVM-Server's first word of this daemon.
_DELIVER_S = 2.0
#: How long storage that is away is waited for with the checkpoint of a dead attempt.
_STORAGE_PATIENCE_S = 1800.0
#: Seconds between two looks for claims that a fault of ours has left, and the longest while one that cannot
#: be settled is left alone.
_LOOK_S, _AGAIN_MAX_S = 30.0, 600.0


def clear(services: Services) -> None:
    """End what still runs of the daemon before, and wipe every workspace that no claim needs any more."""
    if killed := kill_marked(f"{services.settings.work_dir}/"):
        event(Event.LEFTOVERS_REMOVED).warning(
            "ended {} processes that the daemon before this one had left behind; nothing to do", killed
        )
    needed = {workspace_name(row) for row in services.ledger.claims()}
    for name in workspace.sweep(services.settings.work_dir, keep=needed):
        event(Event.LEFTOVERS_REMOVED).info("wiped what was left of {}", name)


class Settlement(threading.Thread):
    """Hands back each attempt that nobody works on any more; one thread for the daemon's life.

    At a start those that died with the daemon before. Until it then sets `Condition.settled`, neither lanes
    nor worker status speak to RVM-Server: the first word of a new daemon ends the attempts of the old one,
    and another worker could claim a job before its checkpoint is told.

    Later those that a fault of the worker's own has left in the ledger. No lane claims such a job meanwhile,
    and RVM-Server compares the lease token, so that nothing runs twice.
    """

    def __init__(self, services: Services) -> None:
        super().__init__(name="settlement", daemon=True)
        self._services = services
        #: The claims that the daemon before left.
        self._inherited: set[str] = set()

    def run(self) -> None:
        """Clear, settle claim after claim, then let the worker claim; then look again and again."""
        services, condition = self._services, self._services.condition
        clear(services)
        condition.cleared.set()
        services.outbox.wake()
        backoff = services.retry.backoff(longest_s=_AGAIN_MAX_S)
        while not condition.stopping.is_set():
            try:
                unsettled = self._settle_all()
            except sqlite3.Error:
                event(Event.WORKER_FAULT).exception(
                    "the ledger cannot be read: tried again; see to the disk of [worker] state_dir"
                )
                condition.stopping.wait(backoff.next_s())
                continue
            if condition.stopping.is_set():
                return
            condition.recover(SETTLEMENT)
            if not condition.settled.is_set():
                services.outbox.flush(_DELIVER_S)
                instance.note(services.settings.worker.state_dir, services.instance_id)
                condition.settled.set()
            if unsettled:
                pause_s = backoff.next_s()
                told = f"{unsettled} of this worker's claims cannot be handed back, its log says why"
                condition.degrade("unsettled", f"{told}: it tries again", frozenset())
            else:
                backoff.reset()
                pause_s = services.settings.scaled(_LOOK_S)
                condition.recover("unsettled")
            condition.stopping.wait(pause_s)

    def _settle_all(self) -> int:
        """Settle each claim that nobody works on; returns how many could not be settled."""
        left, failed = self._left(), 0
        if not self._services.condition.settled.is_set():
            self._inherited |= {row.claim_id for row in left}
        for row in left:
            if self._services.condition.stopping.is_set():
                break
            try:
                self._settle(row)
            except Exception:  # noqa: BLE001 - one claim that cannot be settled must not hold up all work
                event(Event.JOB_LEFT_BEHIND, row.job_id).exception(
                    "not settled: tried again; please report this fault with these lines"
                )
                failed += 1
        return failed

    def _left(self) -> list[ClaimRow]:
        """Return the claims that nobody works on.

        Who works on one holds it for longer than it is in the ledger: one that is there before and after
        the look at what is held, and was not held, is nobody's.
        """
        rows = self._services.ledger.claims()
        held = self._services.condition.held()
        left = {row.claim_id for row in rows if row.job_id not in held}
        return [row for row in self._services.ledger.claims() if row.claim_id in left] if left else []

    def _settle(self, row: ClaimRow) -> None:
        services = self._services
        lease_token = row.lease_token or self._repeat(row)
        if lease_token is None:
            return
        error = self._why(row)
        attempt_log.tell_ended(row.job_id, error)
        report = final_report.never_ran(services.settings, row.job_id, lease_token, error)
        dead = Workspace(services.settings.work_dir / workspace_name(row), row.job_id, row.attempt or 1)
        left_off = self._save_checkpoint(dead, lease_token)
        if services.condition.stopping.is_set():
            return  # the ledger and the workspace keep it for the next start
        if left_off:
            report["checkpoint"] = to_wire(left_off)
        workspace.wipe(dead.root)
        services.ledger.finish(row.job_id, report)
        if row.claim_id in self._inherited:  # one of this daemon's was counted when its attempt ended
            services.tally.ended(row.job_type, report["status"], error.code)
        services.outbox.wake()

    def _why(self, row: ClaimRow) -> JobError:
        if row.claim_id not in self._inherited:
            return InternalError("a fault of the worker's own ended the attempt; its log has the traceback")
        if row.state is ClaimState.CLAIMING:
            return WorkerStoppedError("the worker ended before the job had begun")
        if row.state is ClaimState.STOPPED:
            return WorkerStoppedError("the worker was stopped while the job ran")
        return WorkerDiedError(f"the worker died while the job was {row.state.value}")

    def _tell(self, waiting: str, error: Exception) -> None:
        """Tell what the settlement waits for."""
        condition = self._services.condition
        claims = "" if condition.settled.is_set() else ", nothing is claimed"
        sentence = f"{waiting}{claims}: {error}"
        if condition.degrade(SETTLEMENT, sentence, frozenset()):
            event(Event.SETTLEMENT_WAITS).warning("{}; nothing to do unless it stays so", sentence)

    def _save_checkpoint(self, dead: Workspace, lease_token: str) -> Checkpoint | None:
        """Store the newest checkpoint that was left; a storage that is away is waited for, not for ever."""
        services, condition = self._services, self._services.condition
        put = checkpoint_put(services, dead, lease_token)
        until_s = time.monotonic() + services.settings.scaled(_STORAGE_PATIENCE_S)
        backoff = services.retry.backoff()
        while not condition.stopping.is_set():
            mark = condition.mark()
            try:
                return checkpoints.store_newest(dead, put, checkpoints.max_bytes(services.settings))
            except checkpoints.StorageAwayError as error:
                if time.monotonic() >= until_s:
                    event(Event.JOB_CHECKPOINT_LOST, dead.job_id).warning(
                        "{}: given up, the job goes on from an earlier one, or anew; nothing to do", error
                    )
                    return None
                self._tell(f"the last checkpoint of {dead.job_id} waits for storage", error)
                condition.rest(backoff.next_s(), mark)
        return None

    def _repeat(self, row: ClaimRow) -> str | None:
        """Repeat a claim whose answer was lost, until RVM-Server has said yes or no.

        Returns the lease token; None when there is none, or when the worker is stopped first.
        """
        services = self._services
        backoff = services.retry.backoff()
        while True:
            mark = services.condition.mark()
            try:
                return services.controller.claim(row.job_id, row.claim_id).lease_token
            except (FencedError, RequestRejectedError) as error:
                event(Event.JOB_CLAIM_REFUSED, row.job_id).info(
                    "the claim whose answer was lost is not ours: {}", error
                )
                services.ledger.forget(row.job_id)
                return None
            except ControllerError as error:
                self._tell(f"the claim of {row.job_id} is unsettled", error)
                if services.condition.rest(backoff.next_s(error), mark):
                    return None  # the ledger keeps it for the next start
                services.retry.before_retry(error)


def workspace_name(row: ClaimRow) -> str:
    """Return the name of the directory that a claim's attempt works in."""
    return f"{row.job_id}-{row.attempt}"
