"""Requests for inference become jobs: models resolved, the most suspicious first."""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy.exc import IntegrityError

from rvmcv_worker.reference import inference_wire
from rvmcv_worker.reference.activation import EDGE_MODEL, active_model
from rvmcv_worker.reference.inference_tables import InferenceJob
from rvmcv_worker.reference.jobs import enqueue, find_job
from rvmcv_worker.reference.models import ACTIVE, ModelShelf
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.refused import FieldRefusedError
from rvmcv_worker.reference.tables import ModelVersion

SEGMENTER_MODEL = "sam2"
#: As `segmenter`: the masks of a YOLO11-seg model itself.
OWN_MASKS = "yolo"
#: Of a fraud check of which the machine was sure, and how much more for one of which it was not at all.
SURE_PRIORITY, UNSURE_PRIORITY = 10, 10
#: Of what waits behind every fraud check.
PRIORITIES = {"playground": 5, "reanalysis": 2, "batch_analysis": 0}


def queue_inference(
    queue: Queue, models: ModelShelf, wanted: inference_wire.InferenceRequest, asked_by: str
) -> str:
    """Queue one inference and return its job's id; raises `FieldRefusedError`.

    Asked again under the same `request_id`, it is the job that the first time made.
    """
    if wanted.request_id is None:
        return _queue(queue, models, wanted, asked_by, None)
    job_id = _named(asked_by, wanted.request_id)
    if _is_known(queue, job_id, wanted):
        return job_id
    try:
        return _queue(queue, models, wanted, asked_by, job_id)
    except IntegrityError:  # the same request came twice at once, and the other one was first
        if _is_known(queue, job_id, wanted):
            return job_id
        raise


def _queue(
    queue: Queue,
    models: ModelShelf,
    wanted: inference_wire.InferenceRequest,
    asked_by: str,
    job_id: str | None,
) -> str:
    config = {**_asked(wanted), **resolved(queue, models, wanted)}
    priority = priority_of(wanted.purpose, wanted.edge_result)
    with queue.turn() as turn:
        job = enqueue(turn, "inference", config, priority=priority, job_id=job_id)
        assert isinstance(job, InferenceJob)
        job.asked_by = asked_by
        return job.job_id


def _asked(wanted: inference_wire.InferenceRequest) -> dict[str, Any]:
    return wanted.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"request_id"})


def _named(asked_by: str, request_id: str) -> str:
    """Return the job's id that follows from who asked and the name it gave: so there can be one job only."""
    return f"infer_{hashlib.sha256(f'{asked_by}/{request_id}'.encode()).hexdigest()[:32]}"


def _is_known(queue: Queue, job_id: str, wanted: inference_wire.InferenceRequest) -> bool:
    """Whether this has been asked already; raises `FieldRefusedError` for another question of that name."""
    with queue.look() as turn:
        job = find_job(turn, job_id)
        if job is None:
            return False
        # The models were filled in then, and another one may be active now: that is no other question.
        filled_in = {"model_version", "segmenter"}
        named = inference_wire.InferenceRequest.model_fields.keys() - filled_in
        before = {key: job.config[key] for key in named if key in job.config}
        now = {key: value for key, value in _asked(wanted).items() if key not in filled_in}
        if before != now:
            why = f"was used for another question ({job_id}): give each a name of its own"
            raise FieldRefusedError("request_id", why)
        return True


def resolved(queue: Queue, models: ModelShelf, wanted: inference_wire.Options) -> dict[str, Any]:
    """Return what a config says of its models: names, hashes, and whether each is active now.

    Only what is active now counts as approved: a roll-back takes the trust away with the activity.
    """
    model = models.find(wanted.model_version or ACTIVE)
    if model is None:
        why = f"no model is called {wanted.model_version}: see GET /api/v1/cv/models"
        if wanted.model_version is None:
            why = f"no {EDGE_MODEL} is active: activate one, or name one"
        raise FieldRefusedError("model_version", why)
    if model.model_name == SEGMENTER_MODEL:
        raise FieldRefusedError("model_version", f"{model.version} is a {SEGMENTER_MODEL}, not a detector")
    fields = {
        "model_version": _called(wanted.model_version, model),
        "model_sha256": model.sha256_hash,
        "model_active": model.is_active,
    }
    if wanted.segmentation:
        fields |= _resolved_segmenter(queue, models, wanted.segmenter)
    elif wanted.segmenter is not None:
        raise FieldRefusedError("segmenter", "goes with segmentation only: set segmentation to true")
    return fields


def _resolved_segmenter(queue: Queue, models: ModelShelf, wanted: str | None) -> dict[str, Any]:
    if wanted == OWN_MASKS:
        return {"segmenter": OWN_MASKS}
    if wanted is None:
        with queue.look() as turn:
            model = active_model(turn, SEGMENTER_MODEL)
        if model is None:
            return {}
    else:
        model = models.find(wanted)
        if model is None:
            raise FieldRefusedError("segmenter", f"no model is called {wanted}: upload it first")
        if model.model_name != SEGMENTER_MODEL:
            raise FieldRefusedError(
                "segmenter", f"{model.version} is a {model.model_name}, not a {SEGMENTER_MODEL}"
            )
    return {
        "segmenter": _called(wanted, model),
        "segmenter_sha256": model.sha256_hash,
        "segmenter_active": model.is_active,
    }


def _called(wanted: str | None, model: ModelVersion) -> str:
    """Return the model's name as it was asked for, which the result repeats; its version if it had none."""
    return model.version if wanted is None or wanted.lower() in (ACTIVE, model.sha256_hash) else wanted


def priority_of(purpose: str | None, edge_result: inference_wire.EdgeResult | None) -> int:
    """Return 10 to 20 for a fraud check, the higher the less sure the machine was; lower for the rest.

    A machine is as sure as of its least certain detection; one that saw nothing is not sure at all.
    """
    if purpose in PRIORITIES:
        return PRIORITIES[purpose]
    if edge_result is None:
        return SURE_PRIORITY
    confidence = min((seen.confidence for seen in edge_result.detections), default=0.0)
    return SURE_PRIORITY + round(UNSURE_PRIORITY * (1 - confidence))
