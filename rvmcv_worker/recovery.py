"""What a start does before it claims anything: settle what the daemon before it left behind.

First what needs nobody (`clear`), then, in a thread of its own, what needs RVM-Server or storage
(`Settlement`): neither the main loop nor systemd waits for a network.
"""

from __future__ import annotations

import threading
import time

from loguru import logger

from rvmcv_worker import checkpoints, final_report, workspace
from rvmcv_worker.attempt import Services, checkpoint_put
from rvmcv_worker.controller import ControllerError, RequestRejectedError
from rvmcv_worker.errors import FencedError, JobError, WorkerDiedError, WorkerStoppedError
from rvmcv_worker.ledger import ClaimRow, ClaimState
from rvmcv_worker.process_tree import kill_marked
from rvmcv_worker.protocol import Checkpoint, to_wire
from rvmcv_worker.workspace import Workspace

#: How long the hand-backs, with their checkpoints, may take to be RVM-Server's first word of this daemon.
_DELIVER_S = 2.0
#: How long storage that is away is waited for with the checkpoint of a dead attempt.
_STORAGE_PATIENCE_S = 1800.0


def clear(services: Services) -> None:
    """End what still runs of the daemon before, and wipe every workspace that no claim needs any more."""
    if killed := kill_marked(f"{services.settings.work_dir}/"):
        logger.warning("ended {} processes that the daemon before this one had left behind", killed)
    needed = {_workspace_name(row) for row in services.ledger.claims()}
    for name in workspace.sweep(services.settings.work_dir, keep=needed):
        logger.info("wiped what was left of {}", name)


class Settlement(threading.Thread):
    """Hands back each attempt that died with its daemon; ends when nothing is left to settle.

    Until it sets `Condition.settled`, neither lanes nor worker status speak to RVM-Server: the first word
    of a new daemon ends the attempts of the old one, and another worker could claim a job before its
    checkpoint is told.
    """

    def __init__(self, services: Services) -> None:
        super().__init__(name="settlement", daemon=True)
        self._services = services

    def run(self) -> None:
        """Settle claim after claim, then wipe, then let the worker claim."""
        condition = self._services.condition
        for row in self._services.ledger.claims():
            try:
                self._settle(row)
            except Exception:  # noqa: BLE001 - one claim that cannot be settled must not hold up all work
                logger.bind(job_id=row.job_id).exception("not settled: the next start tries again")
            if condition.stopping.is_set():
                return
        condition.recover("settlement")
        self._services.outbox.flush(_DELIVER_S)
        condition.settled.set()

    def _settle(self, row: ClaimRow) -> None:
        services = self._services
        log = logger.bind(job_id=row.job_id)
        lease_token = row.lease_token or self._repeat(row)
        if lease_token is None:
            return
        error: JobError
        if row.state is ClaimState.CLAIMING:
            error = WorkerStoppedError("the worker ended before the job had begun")
        elif row.state is ClaimState.STOPPED:
            error = WorkerStoppedError("the worker was stopped while the job ran")
        else:
            error = WorkerDiedError(f"the worker died while the job was {row.state.value}")
        log.warning("{}: handed back", error.message)
        report = final_report.never_ran(services.settings, row.job_id, lease_token, error)
        dead = Workspace(services.settings.work_dir / _workspace_name(row), row.job_id, row.attempt or 1)
        left_off = self._save_checkpoint(dead, lease_token)
        if services.condition.stopping.is_set():
            return  # the ledger and the workspace keep it for the next start
        if left_off:
            report["checkpoint"] = to_wire(left_off)
        workspace.wipe(dead.root)
        services.ledger.finish(row.job_id, report)
        services.outbox.wake()

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
                log = logger.bind(job_id=dead.job_id)
                if time.monotonic() >= until_s:
                    log.warning("{}: given up, the job goes on from an earlier one, or anew", error)
                    return None
                waiting = f"a checkpoint of the daemon before waits for storage, nothing is claimed: {error}"
                if condition.degrade("settlement", waiting):
                    log.warning(waiting)
                condition.rest(backoff.next_s(), mark)
        return None

    def _repeat(self, row: ClaimRow) -> str | None:
        """Repeat a claim whose answer was lost, until RVM-Server has said yes or no.

        Returns the lease token; None when there is none, or when the worker is stopped first.
        """
        services = self._services
        log = logger.bind(job_id=row.job_id)
        backoff = services.retry.backoff()
        while True:
            mark = services.condition.mark()
            try:
                return services.controller.claim(row.job_id, row.claim_id).lease_token
            except (FencedError, RequestRejectedError) as error:
                log.info("the claim whose answer was lost is not ours: {}", error)
                services.ledger.forget(row.job_id)
                return None
            except ControllerError as error:
                waiting = f"a claim of the daemon before is unsettled, nothing is claimed: {error}"
                if services.condition.degrade("settlement", waiting):
                    log.warning(waiting)
                if services.condition.rest(backoff.next_s(error), mark):
                    return None  # the ledger keeps it for the next start
                services.retry.before_retry(error)


def _workspace_name(row: ClaimRow) -> str:
    return f"{row.job_id}-{row.attempt}"
