"""What the configs of `inference` and `batch-inference` have in common, and how a wrong one is explained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rvmcv_worker.config import ModelName
from rvmcv_worker.engine_wire import MaskFormat, Options
from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.jobs.job_config import Fraction, explain, unknown
from rvmcv_worker.protocol import Sha256

#: As `segmenter`: the masks of a YOLO11-seg model itself.
OWN_MASKS = "yolo"

Url = Annotated[str, Field(min_length=1, max_length=4096)]
Purpose = Literal["fraud_check", "playground", "reanalysis", "batch_analysis"]


class InferenceOptions(BaseModel):
    """Which models, and what is asked of them."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, protected_namespaces=()
    )

    model_version: ModelName | None = None
    model_sha256: Sha256 | None = None
    #: RVM-Server's word that an admin has activated this model.
    model_active: bool = False
    confidence_threshold: Fraction = 0.25
    iou_threshold: Fraction = 0.7
    img_size: Annotated[int | None, Field(ge=32, le=2048, multiple_of=32)] = None
    max_detections: Annotated[int, Field(ge=1, le=1000)] = 300
    segmentation: bool = False
    segmenter: ModelName | None = None
    segmenter_sha256: Sha256 | None = None
    segmenter_active: bool = False
    mask_format: Annotated[MaskFormat, Field(strict=False)] = MaskFormat.PNG
    annotated: bool = False
    purpose: Purpose | None = None
    #: Never called: reports go to the configured server only.
    callback_url: str | None = None

    def options(self) -> Options:
        """Return what the engine is asked for."""
        return Options(
            confidence=self.confidence_threshold,
            iou=self.iou_threshold,
            imgsz=self.img_size,
            max_detections=self.max_detections,
            segmentation=self.segmentation,
            mask_format=self.mask_format,
            annotated=self.annotated,
        )


Config = TypeVar("Config", bound=InferenceOptions)


def parse(model: type[Config], config: Mapping[str, Any]) -> Config:
    """Validate a job's config; raises `InvalidJobError` that names each wrong key and its range."""
    known = {key: value for key, value in config.items() if key in model.model_fields}
    wrong = [unknown(str(key), model.model_fields) for key in config if key not in known]
    try:
        parsed = model.model_validate(known)
    except ValidationError as error:
        wrong += explain(error, config)
    if wrong:
        raise InvalidJobError("; ".join(wrong))
    return parsed
