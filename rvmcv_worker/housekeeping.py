"""What may be late: the model store is trimmed.

APScheduler follows the wall clock and falls silent when that jumps back, so nothing that must not be
late is in here.
"""

from __future__ import annotations

from apscheduler.schedulers.background import BackgroundScheduler

from rvmcv_worker.attempt import Services


def start(services: Services) -> BackgroundScheduler:
    """Start the schedule; the caller shuts it down."""
    scheduler = BackgroundScheduler(timezone="UTC")
    interval_s = services.settings.scaled(600.0)
    scheduler.add_job(services.model_store.trim, "interval", seconds=interval_s, coalesce=True)
    scheduler.start()
    return scheduler
