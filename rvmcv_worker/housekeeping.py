"""What may be late: storage is asked for, the model store is trimmed.

APScheduler follows the wall clock and falls silent when that jumps back, so nothing that must not be
late is in here.
"""

from __future__ import annotations

from datetime import datetime, timezone

from apscheduler.schedulers.background import BackgroundScheduler
from loguru import logger

from rvmcv_worker.attempt import Services

#: Why a training delivers less than it could.
NO_STORAGE = (
    "no storage: no MinIO keys here and no job-uploads at RVM-Server; trainings keep no checkpoints and"
    " deliver best.pt by upload-model only"
)


def check_storage(services: Services) -> None:
    """Tell where results have no storage to go to: that is no fault, but it limits what is delivered."""
    storage = services.storage
    reason = None if storage.can_store or not storage.lacking else NO_STORAGE
    if services.condition.note("storage", reason):
        logger.info(reason or "there is storage for results now")


def start(services: Services) -> BackgroundScheduler:
    """Start the schedule; the caller shuts it down."""
    scheduler = BackgroundScheduler(timezone="UTC")
    scaled = services.settings.scaled
    scheduler.add_job(
        check_storage,
        "interval",
        [services],
        seconds=scaled(60.0),
        next_run_time=datetime.now(timezone.utc),
        coalesce=True,
    )
    scheduler.add_job(services.model_store.trim, "interval", seconds=scaled(600.0), coalesce=True)
    scheduler.start()
    return scheduler
