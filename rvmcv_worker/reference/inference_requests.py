"""Requests for inference become jobs: models resolved, the most suspicious first."""

from __future__ import annotations

from typing import Any

from rvmcv_worker.reference import inference_wire
from rvmcv_worker.reference.activation import EDGE_MODEL, active_model
from rvmcv_worker.reference.inference_tables import InferenceJob
from rvmcv_worker.reference.jobs import enqueue
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
    """Queue one inference and return its job's id; raises `FieldRefusedError`."""
    fields = wanted.model_dump(mode="json", by_alias=True, exclude_none=True)
    config = {**fields, **resolved(queue, models, wanted)}
    priority = priority_of(wanted.purpose, wanted.edge_result)

    with queue.turn() as turn:
        job = enqueue(turn, "inference", config, priority=priority)
        assert isinstance(job, InferenceJob)
        job.asked_by = asked_by
        return job.job_id


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
