"""What may be late: the disk is looked at, the model store is trimmed.

APScheduler follows the wall clock and falls silent when that jumps back, so nothing that must not be
late is in here.
"""

from __future__ import annotations

import psutil
from apscheduler.schedulers.background import BackgroundScheduler
from loguru import logger

from rvmcv_worker.attempt import Services

_GB = 1024**3


def check_disk(services: Services) -> None:
    """Stop claiming while the disk is nearly full."""
    settings = services.settings
    free_gb = psutil.disk_usage(str(settings.work_dir)).free / _GB
    if free_gb < settings.limits.disk_floor_gb:
        reason = (
            f"{free_gb:.1f} GB are free on the disk of {settings.work_dir}, below [limits] disk_floor_gb = "
            f"{settings.limits.disk_floor_gb:g}: nothing is claimed until there is room"
        )
        if services.condition.degrade("disk", reason):
            logger.warning(reason)
    elif services.condition.recover("disk"):
        logger.info("there is room on the disk again: claiming goes on")


def start(services: Services) -> BackgroundScheduler:
    """Start the schedule; the caller shuts it down."""
    scheduler = BackgroundScheduler(timezone="UTC")
    scaled = services.settings.scaled
    scheduler.add_job(check_disk, "interval", [services], seconds=scaled(10.0), coalesce=True)
    scheduler.add_job(services.model_store.trim, "interval", seconds=scaled(600.0), coalesce=True)
    scheduler.start()
    return scheduler
