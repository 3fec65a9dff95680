"""Which model is active: by an admin's word, or, when allowed, because it was proven better."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update

from rvmcv_worker.reference.tables import ModelActivation, ModelVersion, TrainingJob
from rvmcv_worker.reference.turn import Turn

#: The model that RVM-Edge runs.
EDGE_MODEL = "yolo11"


def settle_model(turn: Turn, job: TrainingJob, result: dict[str, Any]) -> None:
    """Make usable the model that a completed finish names; activate it where that is allowed."""
    model = turn.session.scalar(
        select(ModelVersion)
        .where(
            ModelVersion.training_job_id == job.id,
            ModelVersion.sha256_hash == result.get("sha256_hash"),
        )
        .order_by(ModelVersion.id.desc())
    )
    if model is None:
        return
    model.usable = True
    model.metrics = model.metrics or result.get("metrics")
    objection = reason_against(turn, model, result)
    if objection is None:
        activate(turn, model, by="auto_activate")
    job.activation = {
        "model_id": model.id,
        "activated": objection is None,
        "reason": objection or "measured better than the active model on the same val split",
    }


def reason_against(turn: Turn, model: ModelVersion, result: dict[str, Any]) -> str | None:
    """Return why a new model must wait for an admin; None when it may be activated at once.

    It must have been measured beside the active model, in the same job, on the same val split
    (``metrics.active``, with the active model's ``sha256``), for the same ``task`` and ``classes``,
    on data without leaks (``metrics.leaks`` is 0), and its ``fitness`` must be higher.
    """
    if not turn.settings.auto_activate:
        return "auto_activate is off"
    if model.model_name == "sam2":
        return "SAM2 is never activated automatically"
    active = active_model(turn, model.model_name)
    if active is None:
        return "there is no active model to compare with"
    metrics = result.get("metrics") or {}
    beside = metrics.get("active")
    if not isinstance(beside, dict) or beside.get("sha256") != active.sha256_hash:
        return "the active model was not measured in the same job"
    for key in ("task", "classes"):
        if key not in metrics or metrics[key] != beside.get(key):
            return f"the active model has another {key}"
    if metrics.get("leaks") != 0:
        return "the data report warns of leaks between the splits, or does not say"
    new, old = metrics.get("fitness"), beside.get("fitness")
    if not isinstance(new, (int, float)) or not isinstance(old, (int, float)) or not new > old:
        return f"its fitness {new} is not above the active model's {old}"
    return None


def active_model(turn: Turn, model_name: str | None) -> ModelVersion | None:
    """Return the active model of a name; of any name, the newest, when none is given."""
    query = select(ModelVersion).where(ModelVersion.is_active).order_by(ModelVersion.id.desc())
    if model_name is not None:
        query = query.where(ModelVersion.model_name == model_name)
    return turn.session.scalars(query).first()


def activate(turn: Turn, model: ModelVersion, *, by: str) -> None:
    """Make this the one active model of its name. A roll-back is the activation of an older one."""
    previous = active_model(turn, model.model_name)
    turn.session.execute(
        update(ModelVersion).where(ModelVersion.model_name == model.model_name).values(is_active=False)
    )
    model.is_active = True
    turn.session.add(
        ModelActivation(
            model_id=model.id,
            previous_model_id=previous.id if previous else None,
            activated_by=by,
            activated_at=turn.now,
        )
    )


def was_activated(turn: Turn, model: ModelVersion) -> bool:
    """Return whether an admin's word, now or earlier, gave this model to RVM-Edge."""
    query = select(ModelActivation.id).where(ModelActivation.model_id == model.id)
    return turn.session.scalars(query).first() is not None
