"""What all trainings have in common: the frame of the job type, and the steps before the train child."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rvmcv_worker.controller import ControllerError
from rvmcv_worker.errors import DatasetUnavailableError, JobError
from rvmcv_worker.events import Event, event
from rvmcv_worker.jobs import training_delivery, training_results
from rvmcv_worker.retry import RetryStoppedError
from rvmcv_worker.state import Lane

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt
    from rvmcv_worker.jobs.training_config import TrainingConfig
    from rvmcv_worker.protocol import DatasetInfo, JobOffer

_GB = 1024**3
_MB = 1024**2
#: Tries to learn from RVM-Server where a data set is.
_LOOK_UP_TRIES = 3


class Training(ABC):
    """A job type that trains a model; stateless, one for the daemon's life."""

    lane = Lane.TRAIN

    @abstractmethod
    def train(self, attempt: Attempt, config: Any) -> dict[str, Any]:
        """Fetch, check, train, publish; returns the report's `result`."""

    def run(self, attempt: Attempt, config: Any) -> dict[str, Any]:
        """Do all of it; a failed training delivers its log and the data report too."""
        try:
            return self.train(attempt, config)
        except JobError as error:
            if error.code != "worker_stopped":
                error.result = training_delivery.deliver_failure(attempt)
            raise

    def courtesy(self, offer: JobOffer, report: Mapping[str, Any]) -> dict[str, Any] | None:
        """`training-complete` follows a training that is over."""
        if report["status"] == "completed":
            metrics = json.dumps(report["result"]["metrics"])
            return {"training_job_id": offer.id, "status": "success", "metrics": metrics}
        if report["status"] == "failed":
            message = f"{report['error']['code']}: {report['error']['message']}"
            return {"training_job_id": offer.id, "status": "failed", "error_message": message}
        return None


def fetch_data_set(attempt: Attempt, config: TrainingConfig) -> None:
    """Bring the archive to where the prepare child looks for it."""
    services = attempt.services
    url, sha256 = config.dataset_url, config.dataset_sha256
    if url is None:
        info = _look_up(attempt, config)
        url, sha256 = info.download_url, sha256 or info.sha256
    services.storage.fetch(
        url,
        attempt.workspace.in_dir / "dataset.archive",
        max_bytes=int(services.settings.limits.max_dataset_gb * _GB),
        sha256=sha256,
        interrupt=attempt.interrupt,
        unavailable=DatasetUnavailableError,
        on_bytes=lambda done, total: attempt.progress.update(
            message=f"data set: {done // _MB} of {total // _MB if total else '?'} MB"
        ),
    )


def _look_up(attempt: Attempt, config: TrainingConfig) -> DatasetInfo:
    services = attempt.services
    try:
        return services.retry.call(
            lambda: services.controller.dataset(str(config.dataset_id)),
            stop=attempt.interrupt,
            give_up_after=_LOOK_UP_TRIES,
        )
    except RetryStoppedError:
        attempt.interrupt.check()
        raise
    except ControllerError as error:
        raise DatasetUnavailableError(
            f"data set {config.dataset_id}: {error}; check config.dataset_id at RVM-Server"
        ) from None


def fetch_base_model(attempt: Attempt, config: TrainingConfig) -> str:
    """Bring the base model into the workspace; returns its path as the train child sees it."""
    _place_model(attempt, config.base_model, config.base_model_sha256, "base.pt")
    return "in/base.pt"


def fetch_active_model(attempt: Attempt, config: TrainingConfig) -> str | None:
    """Bring the active model, to be measured on the same pictures; a training goes on without."""
    if config.active_model_sha256 is None:
        return None
    try:
        _place_model(attempt, config.active_model_sha256, config.active_model_sha256, "active.pt")
    except JobError as error:
        if error.code == "worker_stopped":
            raise
        event(Event.JOB_INCOMPLETE, attempt.offer.job_id).warning(
            "the active model is not compared: {}; nothing to do", error.message
        )
        return None
    return "in/active.pt"


def _place_model(attempt: Attempt, wanted: str, sha256: str | None, name: str) -> None:
    services = attempt.services
    found = services.model_store.fetch_base_model(
        wanted,
        expected_sha256=sha256,
        storage=services.storage,
        max_bytes=int(services.settings.limits.max_model_mb * _MB),
        interrupt=attempt.interrupt,
    )
    services.model_store.place(found, attempt.workspace.in_dir / name)


def prepare(
    attempt: Attempt, config: TrainingConfig, *, job_type: str, label_task: str, seed: int
) -> dict[str, Any]:
    """Unpack and check the data set behind the wall; returns the data report, and the archive is gone."""
    settings = attempt.services.settings
    job = {
        "task": "prepare",
        "archive": "in/dataset.archive",
        "job_type": job_type,
        "label_task": label_task,
        "names": config.names,
        "seed": seed,
        "val_fraction": settings.dataset.val_fraction,
        "max_bad_fraction": settings.dataset.max_bad_fraction,
        "limits": {
            "max_unpacked_bytes": int(settings.limits.max_workspace_gb * _GB / 2),
            "max_entries": settings.limits.max_archive_entries,
            "max_ratio": settings.limits.max_archive_ratio,
            "max_image_pixels": int(settings.limits.max_image_megapixels * 1_000_000),
        },
    }
    with attempt.phase("verify"):
        report = attempt.run_child("prepare", job, timeout_s=settings.limits.max_prepare_s).result
        training_results.require(training_results.Prepared, "prepare", report)
        (attempt.workspace.in_dir / "dataset.archive").unlink()
    return report


def device_of(attempt: Attempt) -> str:
    """Return the attempt's GPUs as its train child counts them, or ``cpu``."""
    return ",".join(map(str, range(len(attempt.gpus)))) or "cpu"
