"""What a start does before it claims anything: settle what the daemon before it left behind."""

from __future__ import annotations

from loguru import logger

from rvmcv_worker import workspace
from rvmcv_worker.attempt import Services, failed_report
from rvmcv_worker.controller import ControllerError
from rvmcv_worker.errors import FencedError, WorkerDiedError
from rvmcv_worker.ledger import ClaimRow
from rvmcv_worker.process_tree import kill_marked


def settle(services: Services) -> None:
    """Hand back each attempt that died with its daemon, and wipe the workspaces.

    A claim whose answer was never seen is repeated under its `claim_id`, so that RVM-Server need not
    wait for its lease; when that cannot be asked now, the lease runs out by itself.
    """
    for row in services.ledger.claims():
        log = logger.bind(job_id=row.job_id)
        lease_token = row.lease_token or _repeat(services, row)
        if lease_token is None:
            services.ledger.forget(row.job_id)
            continue
        log.warning("the worker died while the job was {}: handed back", row.state.value)
        died = WorkerDiedError(f"the worker died while the job was {row.state.value}")
        services.ledger.finish(row.job_id, failed_report(services.settings, row.job_id, lease_token, died))
    if killed := kill_marked(f"{services.settings.work_dir}/"):
        logger.warning("ended {} processes that the daemon before this one had left behind", killed)
    for name in workspace.sweep(services.settings.work_dir, keep=set()):
        logger.info("wiped what was left of {}", name)


def _repeat(services: Services, row: ClaimRow) -> str | None:
    """Repeat a claim whose answer was lost; returns its lease token, or None when there is none."""
    try:
        return services.controller.claim(row.job_id, row.claim_id).lease_token
    except (ControllerError, FencedError) as error:
        logger.bind(job_id=row.job_id).info("claim not repeated: {}", error)
        return None
