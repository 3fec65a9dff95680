"""What a training leaves, to RVM-Server: the model, frozen and checked, its artifacts, the result."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvmcv_worker import checkpoints
from rvmcv_worker.errors import JobCrashedError, JobError
from rvmcv_worker.events import Event, event
from rvmcv_worker.jobs import training_results
from rvmcv_worker.ledger import ClaimState
from rvmcv_worker.storage import MODEL_PATIENCE_S

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt
    from rvmcv_worker.jobs.training_config import TrainingConfig

_MB = 1024**2
#: Seconds for the check child to open the model and run it once.
_CHECK_S = 300.0
#: The weights alone, where a job wants them; as large as the model.
_SAFETENSORS = "best.safetensors"
#: Largest artifact beside the model, in bytes.
_MAX_ARTIFACT_BYTES = 32 * _MB


@dataclass(frozen=True)
class Kind:
    """What distinguishes the models of one job type."""

    #: As RVM-Server files them: a `model_name` of `upload-model`.
    model_name: str
    #: ``detect`` or ``segment``.
    label_task: str
    #: What may be published beside `best.pt`, by exact name: a child names nothing.
    artifacts: tuple[str, ...]
    #: What the check child is told beside the model and what it should be.
    check: dict[str, Any]
    #: What must have been measured.
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Model:
    """The trained model as the daemon holds it, where no child can reach it."""

    path: Path
    sha256: str
    size_bytes: int


def deliver(
    attempt: Attempt, config: TrainingConfig, kind: Kind, trained: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """Freeze, check and publish what the train child left; returns the report's `result`."""
    training_results.require(training_results.Trained, checkpoints.CHILD, trained, kind.metrics)
    with attempt.phase("evaluate"):
        best = _freeze(attempt, "best.pt")
        if best is None:
            raise JobCrashedError("the training ended without a best.pt")
        safe = _freeze(attempt, _SAFETENSORS) if config.safetensors else None
        checked = _check(attempt, best, safe, kind, data["names"], config.base_model)
    attempt.progress.confirm("upload")
    attempt.enter(ClaimState.PUBLISHING)
    with attempt.phase("upload"):
        result = _publish(attempt, config, kind, best, trained, data) | {"check": checked}
        if config.safetensors:
            result["artifacts"].update(_store_safetensors(attempt, safe))
        return result


def _freeze(attempt: Attempt, name: str) -> _Model | None:
    max_bytes = int(attempt.services.settings.limits.max_model_mb * _MB)
    path = attempt.workspace.read_back("train", name, max_bytes=max_bytes)
    if path is None:
        return None
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_MB):
            digest.update(chunk)
    return _Model(path, digest.hexdigest(), path.stat().st_size)


def _check(
    attempt: Attempt, best: _Model, safe: _Model | None, kind: Kind, names: list[str], base_model: str
) -> dict[str, Any]:
    """Open the frozen model in a fresh child that has seen nothing else."""
    candidate = attempt.workspace.in_dir / "candidate.pt"
    shutil.copyfile(best.path, candidate)
    if safe:
        shutil.copyfile(safe.path, candidate.with_suffix(".safetensors"))
    job = {
        "task": "check_model",
        "model": "in/candidate.pt",
        "label_task": kind.label_task,
        "expect": {"task": kind.label_task, "names": names},
        "base_model": base_model,
        "safetensors": "in/candidate.safetensors" if safe else None,
        **kind.check,
    }
    return attempt.run_child("check", job, timeout_s=_CHECK_S).result


def _publish(
    attempt: Attempt,
    config: TrainingConfig,
    kind: Kind,
    best: _Model,
    trained: dict[str, Any],
    data: dict[str, Any],
) -> dict[str, Any]:
    """Bring the artifacts, then the model, to where they are kept; all of it inert until the final report."""
    services = attempt.services
    stored = None
    if services.storage.can_store:
        stored = attempt.store(best.path, "best.pt", best.sha256, patience_s=MODEL_PATIENCE_S)
    artifacts = _store_artifacts(attempt, kind.artifacts)
    version = version_of(attempt.offer.job_id, attempt.claim.attempt)
    metrics = _metrics(config, kind.label_task, trained["metrics"], data)
    uploaded = services.storage.upload_model(
        best.path,
        model_name=kind.model_name,
        version=version,
        metrics=metrics,
        training_job_id=attempt.offer.id,
        lease_token=attempt.claim.lease_token,
        sha256=best.sha256,
        stored=stored,
        interrupt=attempt.interrupt,
    )
    return {
        "model_name": kind.model_name,
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


def _metrics(
    config: TrainingConfig, label_task: str, measured: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """Return what was measured, with all that decides whether it may be compared with the active model."""
    about = {"task": label_task, "classes": data["names"]}
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


def _store_safetensors(attempt: Attempt, safe: _Model | None) -> dict[str, str]:
    """Store the checked weights; {name: path}, {} where that is said to have failed."""
    if safe is None or not attempt.services.storage.can_store:
        why = "the training left none, its log says why" if safe is None else "there is no storage"
        event(Event.JOB_INCOMPLETE, attempt.offer.job_id).warning(
            "{} is not delivered: {}; the job goes on without it, nothing to do", _SAFETENSORS, why
        )
        return {}
    with _optional(attempt, _SAFETENSORS):
        return {_SAFETENSORS: attempt.store(safe.path, _SAFETENSORS, safe.sha256).path}
    return {}


@contextlib.contextmanager
def _optional(attempt: Attempt, name: str) -> Iterator[None]:
    """Go on without an artifact; a wish to stop is no fault of the artifact."""
    try:
        yield
    except JobError as error:
        attempt.interrupt.check()
        event(Event.JOB_INCOMPLETE, attempt.offer.job_id).warning(
            "{} is not delivered: {}; the job goes on without it, nothing to do", name, error.message
        )


def deliver_failure(attempt: Attempt) -> dict[str, Any] | None:
    """Store what tells why a training failed."""
    artifacts = _store_artifacts(attempt, ("results.csv",))
    return {"artifacts": artifacts} if artifacts else None
