"""`yolo11`: train a YOLO11 detector or segmenter, prove what it is worth, deliver it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from rvmcv_worker import checkpoints
from rvmcv_worker.controller import ControllerError
from rvmcv_worker.errors import DatasetUnavailableError, JobCrashedError, JobError, OutOfGpuMemoryError
from rvmcv_worker.jobs import training_config
from rvmcv_worker.jobs.memory_ladder import Rung, smallest_imgsz
from rvmcv_worker.jobs.training_config import TrainingConfig
from rvmcv_worker.ledger import ClaimState
from rvmcv_worker.retry import RetryStoppedError
from rvmcv_worker.state import Lane
from rvmcv_worker.storage import MODEL_PATIENCE_S

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt
    from rvmcv_worker.protocol import DatasetInfo, JobOffer

_GB = 1024**3
_MB = 1024**2
#: Seconds for the check child to open the model and run it once.
_CHECK_S = 300.0
#: Tries to learn from RVM-Server where a data set is.
_LOOK_UP_TRIES = 3
#: Largest artifact beside the model, in bytes.
_MAX_ARTIFACT_BYTES = 32 * _MB

#: What a training may leave to be published beside `best.pt`, by exact name: a child names nothing.
ARTIFACTS = (
    "results.csv",
    "args.yaml",
    "results.png",
    "labels.jpg",
    "confusion_matrix.png",
    "confusion_matrix_normalized.png",
    *(f"{kind}{curve}_curve.png" for kind in ("Box", "Mask") for curve in ("P", "R", "F1", "PR")),
    *(f"train_batch{index}.jpg" for index in range(6)),
    *(f"val_batch{index}_{kind}.jpg" for index in range(3) for kind in ("labels", "pred")),
)


class Yolo11:
    """The job type; stateless, one for the daemon's life."""

    name = "yolo11"
    lane = Lane.TRAIN

    def parse(self, config: Mapping[str, Any]) -> TrainingConfig:
        """Return the validated config; raises `InvalidJobError`."""
        return training_config.parse(config)

    def gpus(self, config: Mapping[str, Any]) -> int:
        """Return how many GPUs the training asks for."""
        return training_config.gpus_wanted(config)

    def run(self, attempt: Attempt, config: TrainingConfig) -> dict[str, Any]:
        """Fetch, check, train, publish; a failed training delivers its log and the data report too."""
        try:
            return _train(attempt, config)
        except JobError as error:
            if error.code != "worker_stopped":
                error.result = _deliver_failure(attempt)
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


def _train(attempt: Attempt, config: TrainingConfig) -> dict[str, Any]:
    limits = attempt.services.settings.limits
    with attempt.phase("download"):
        resume = attempt.fetch_checkpoint()
        _fetch_data_set(attempt, config)
        model = _fetch_base_model(attempt, config)
        active = _fetch_active_model(attempt, config)
    with attempt.phase("verify"):
        data = attempt.run_child(
            "prepare", _prepare_job(attempt, config), timeout_s=limits.max_prepare_s
        ).result
        (attempt.workspace.in_dir / "dataset.archive").unlink()
    attempt.enter(ClaimState.RUNNING)
    with attempt.phase("train"):
        job = {
            "task": "train_yolo11",
            "attempt": attempt.claim.attempt,
            "model": model,
            "model_name": config.base_model,
            "label_task": config.label_task,
            "data": "prepare/data.yaml",
            "options": config.options.model_dump(mode="json", exclude_none=True),
            "active_model": active,
            "device": ",".join(map(str, range(len(attempt.gpus)))) or "cpu",
            "ranks": max(1, len(attempt.gpus)),
            "time_limit_h": config.time_limit_h,
            "resume": resume,
        }
        trained = _train_as_memory_allows(attempt, config, job)
    with attempt.phase("evaluate"):
        best = _freeze(attempt)
        checked = _check(attempt, best, config, data["names"])
    attempt.progress.confirm("upload")
    attempt.enter(ClaimState.PUBLISHING)
    with attempt.phase("upload"):
        return _publish(attempt, config, best, trained, data) | {"check": checked}


def _train_as_memory_allows(attempt: Attempt, config: TrainingConfig, job: dict[str, Any]) -> dict[str, Any]:
    """Run the train child; each time the GPU's memory is too small a fresh one goes on with less."""
    until_s = time.monotonic() + attempt.services.settings.limits.max_job_h * 3600
    asked_imgsz = config.options.imgsz
    smallest = smallest_imgsz(asked_imgsz, may_shrink=config.allow_smaller_img_size)
    rung = Rung(config.options.batch, asked_imgsz)
    while True:
        options = {**job["options"], "batch": rung.batch, "imgsz": rung.imgsz}
        try:
            return attempt.run_child(
                checkpoints.CHILD,
                {**job, "options": options},
                readable=("prepare",),
                timeout_s=max(0.0, until_s - time.monotonic()),
            ).result
        except OutOfGpuMemoryError as error:
            lower = rung.reached(error.detail).below(smallest, smallest_batch=job["ranks"])
            if lower is None:
                raise
            said = f"out of GPU memory: going on with batch {lower.batch} at {lower.imgsz} px"
            logger.bind(job_id=attempt.offer.job_id).warning("{} ({})", said, error.message)
            attempt.progress.update(batch_size=lower.batch, message=said)
            rung = lower
            # What an earlier attempt left is where this one began; its own is newer.
            job = {**job, "resume": checkpoints.newest_file(attempt.workspace) or job["resume"]}


def _fetch_data_set(attempt: Attempt, config: TrainingConfig) -> None:
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


def _fetch_base_model(attempt: Attempt, config: TrainingConfig) -> str:
    """Bring the base model into the workspace; returns what the train child is to start from."""
    if config.from_scratch:
        return config.base_model
    _place_model(attempt, config.base_model, config.base_model_sha256, "base.pt")
    return "in/base.pt"


def _fetch_active_model(attempt: Attempt, config: TrainingConfig) -> str | None:
    """Bring the active model, to be measured on the same pictures; a training goes on without."""
    if config.active_model_sha256 is None:
        return None
    try:
        _place_model(attempt, config.active_model_sha256, config.active_model_sha256, "active.pt")
    except JobError as error:
        if error.code == "worker_stopped":
            raise
        logger.bind(job_id=attempt.offer.job_id).warning(
            "the active model is not compared: {}", error.message
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


def _prepare_job(attempt: Attempt, config: TrainingConfig) -> dict[str, Any]:
    settings = attempt.services.settings
    return {
        "task": "prepare",
        "archive": "in/dataset.archive",
        "job_type": "yolo11",
        "label_task": config.label_task,
        "names": config.names,
        "seed": config.options.seed,
        "val_fraction": settings.dataset.val_fraction,
        "max_bad_fraction": settings.dataset.max_bad_fraction,
        "limits": {
            "max_unpacked_bytes": int(settings.limits.max_workspace_gb * _GB / 2),
            "max_entries": settings.limits.max_archive_entries,
            "max_ratio": settings.limits.max_archive_ratio,
            "max_image_pixels": int(settings.limits.max_image_megapixels * 1_000_000),
        },
    }


@dataclass(frozen=True)
class _Model:
    """The trained model as the daemon holds it, where no child can reach it."""

    path: Path
    sha256: str
    size_bytes: int


def _freeze(attempt: Attempt) -> _Model:
    max_bytes = int(attempt.services.settings.limits.max_model_mb * _MB)
    path = attempt.workspace.read_back("train", "best.pt", max_bytes=max_bytes)
    if path is None:
        raise JobCrashedError("the training ended without a best.pt")
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_MB):
            digest.update(chunk)
    return _Model(path, digest.hexdigest(), path.stat().st_size)


def _check(attempt: Attempt, best: _Model, config: TrainingConfig, names: list[str]) -> dict[str, Any]:
    """Open the frozen model in a fresh child that has seen nothing else."""
    candidate = attempt.workspace.in_dir / "candidate.pt"
    shutil.copyfile(best.path, candidate)
    expect = {"task": config.label_task, "names": names}
    job = {
        "task": "check_model",
        "model": "in/candidate.pt",
        "label_task": config.label_task,
        "expect": expect,
    }
    return attempt.run_child("check", job, timeout_s=_CHECK_S).result


def _publish(
    attempt: Attempt, config: TrainingConfig, best: _Model, trained: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """Bring the artifacts, then the model, to where they are kept; all of it inert until the final report."""
    services = attempt.services
    stored = None
    if services.storage.can_store:
        stored = attempt.store(best.path, "best.pt", best.sha256, patience_s=MODEL_PATIENCE_S)
    artifacts = _store_artifacts(attempt, ARTIFACTS)
    version = version_of(attempt.offer.job_id, attempt.claim.attempt)
    metrics = _metrics(config, trained["metrics"], data)
    uploaded = services.storage.upload_model(
        best.path,
        model_name="yolo11",
        version=version,
        metrics=metrics,
        training_job_id=attempt.offer.id,
        lease_token=attempt.claim.lease_token,
        sha256=best.sha256,
        stored=stored,
        interrupt=attempt.interrupt,
    )
    return {
        "model_name": "yolo11",
        "version": version,
        "result_model_path": uploaded.file_path or (stored.path if stored else None),
        "sha256_hash": best.sha256,
        "file_size_mb": round(best.size_bytes / _MB, 3),
        "metrics": metrics,
        "artifacts": artifacts,
        "data": _summary(data),
        "effective": {
            **trained["effective"],
            "versions": trained["versions"],
            "base_model": config.base_model,
        },
        "attempts": trained["attempts"],
    }


def _metrics(config: TrainingConfig, measured: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured, with all that decides whether it may be compared with the active model."""
    about = {"task": config.label_task, "classes": data["names"]}
    active = measured.get("active")
    if active and "error" not in active:  # measured only where task and classes are the same
        active = {**active, **about, "sha256": config.active_model_sha256}
    leaks = sum(pair["equal"] + pair["near"] for pair in data["leaks"].values())
    return {**measured, **about, "leaks": leaks, "active": active}


def version_of(job_id: str, attempt: int) -> str:
    """Return a model version unique to the attempt, within the 50 characters that RVM-Server takes."""
    ending = f"-a{attempt}"
    if len(job_id) + len(ending) <= 50:
        return job_id + ending
    digest = hashlib.sha256(job_id.encode()).hexdigest()[:8]
    return f"{job_id[: 50 - len(ending) - 9]}-{digest}{ending}"


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return the data report without its list of faults, which lies in storage as `data-report.json`."""
    return {key: value for key, value in report.items() if key != "faults"}


def _store_artifacts(attempt: Attempt, names: tuple[str, ...]) -> dict[str, str]:
    """Store what the children left, by fixed names, with the data report and the log; {name: path}.

    One that cannot be had or stored is said and left out: it is not worth the training.
    """
    if not attempt.services.storage.can_store:
        return {}
    wanted = [("train", name, name) for name in names] + [("prepare", "report.json", "data-report.json")]
    stored: dict[str, str] = {}
    for child, name, as_name in wanted:
        with _optional(attempt, as_name):
            path = attempt.workspace.read_back(child, name, max_bytes=_MAX_ARTIFACT_BYTES)
            if path is not None:
                stored[as_name] = attempt.store(path, as_name).path
    for child in ("train", "prepare"):
        log = attempt.workspace.out_dir / f"{child}.log"
        if log.is_file():
            with _optional(attempt, log.name):
                stored[log.name] = attempt.store(log, log.name).path
    return stored


@contextlib.contextmanager
def _optional(attempt: Attempt, name: str) -> Iterator[None]:
    """Go on without an artifact; a wish to stop is no fault of the artifact."""
    try:
        yield
    except JobError as error:
        attempt.interrupt.check()
        logger.bind(job_id=attempt.offer.job_id).warning("{} is not delivered: {}", name, error.message)


def _deliver_failure(attempt: Attempt) -> dict[str, Any] | None:
    """Store what tells why a training failed."""
    artifacts = _store_artifacts(attempt, ("results.csv",))
    return {"artifacts": artifacts} if artifacts else None
