"""The config of a YOLO11 training job: the plan's fields, and the options of a practitioner.

Ranges and names are Ultralytics' own (8.4); a test compares them with the installed library. An
option may be called as the plan or as Ultralytics calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from rvmcv_worker.config import ModelName
from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.events import Event, event
from rvmcv_worker.jobs import training_config
from rvmcv_worker.jobs.job_config import Fraction
from rvmcv_worker.jobs.training_config import TrainingConfig

Gain = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Degrees = Annotated[float, Field(ge=-180, le=180)]

#: Model definitions for a start from scratch.
SCRATCH = frozenset(f"yolo11{size}{task}.yaml" for size in "nsmlx" for task in ("", "-seg"))
#: Optimizers as Ultralytics spells them, by any spelling.
_OPTIMIZERS = {
    name.lower(): name
    for name in ("SGD", "MuSGD", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSProp", "auto")
}


def _optimizer(value: Any) -> Any:
    found = _OPTIMIZERS.get(str(value).lower())
    if found is None:
        raise ValueError(f"must be one of {', '.join(_OPTIMIZERS.values())}")
    return found


def _cache(value: Any) -> Any:
    """Take `disk` as off: Ultralytics would write beside the images, which a training can only read."""
    if value == "disk":
        event(Event.JOB_OPTION_IGNORED).warning(
            "config.cache: 'disk' is not to be had behind the wall: trained without a cache; nothing to do"
        )
        return False
    return value


class Yolo11Options(BaseModel):
    """What Ultralytics' `train` is called with, under its own names; None keeps its default."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True)

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 100
    imgsz: Annotated[int, Field(ge=32, le=4096, validation_alias=AliasChoices("img_size", "imgsz"))] = 640
    batch: Annotated[int, Field(ge=1, le=4096, validation_alias=AliasChoices("batch_size", "batch"))] = 16
    patience: Annotated[int, Field(ge=0)] = 50
    workers: Annotated[int, Field(ge=0, le=64)] = 8
    optimizer: Annotated[str, BeforeValidator(_optimizer)] = "auto"
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    deterministic: bool = True
    cache: Annotated[bool | Literal["ram"], BeforeValidator(_cache)] = False
    freeze: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] | None = None
    single_cls: bool = False
    rect: bool = False
    cos_lr: bool = False
    close_mosaic: Annotated[int, Field(ge=0)] = 10
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    multi_scale: Fraction = 0.0
    lr0: Annotated[float, Field(gt=0, le=1)] = 0.01
    lrf: Fraction = 0.01
    momentum: Fraction = 0.937
    weight_decay: Fraction = 0.0005
    warmup_epochs: Gain = 3.0
    warmup_momentum: Fraction = 0.8
    warmup_bias_lr: Fraction = 0.1
    box: Gain = 7.5
    cls: Gain = 0.5
    dfl: Gain = 1.5
    nbs: Annotated[int, Field(ge=1)] = 64
    overlap_mask: bool = True
    mask_ratio: Annotated[int, Field(ge=1, le=16)] = 4
    iou: Fraction = 0.7
    max_det: Annotated[int, Field(ge=1, le=10_000)] = 300
    hsv_h: Fraction = 0.015
    hsv_s: Fraction = 0.7
    hsv_v: Fraction = 0.4
    degrees: Degrees = 0.0
    translate: Fraction = 0.1
    scale: Fraction = 0.5
    shear: Degrees = 0.0
    perspective: Annotated[float, Field(ge=0, le=0.001)] = 0.0
    flipud: Fraction = 0.0
    fliplr: Fraction = 0.5
    bgr: Fraction = 0.0
    mosaic: Fraction = 1.0
    mixup: Fraction = 0.0
    cutmix: Fraction = 0.0
    copy_paste: Fraction = 0.0
    copy_paste_mode: Literal["flip", "mixup"] = "flip"


class Yolo11Config(TrainingConfig):
    """Everything a YOLO11 job's config can say beside Ultralytics' options."""

    base_model: Annotated[ModelName, Field(validation_alias=AliasChoices("base_model", "model"))] = (
        "yolo11n.pt"
    )
    task: Literal["detect", "segment"] | None = None
    #: When the GPU's memory does not even hold a batch of 1.
    allow_smaller_img_size: bool = False
    options: Yolo11Options = Yolo11Options()

    @property
    def label_task(self) -> str:
        """``detect`` or ``segment``: as said, else by the base model's name."""
        return self.task or ("segment" if "-seg" in self.base_model else "detect")

    @property
    def from_scratch(self) -> bool:
        """Whether the base model is a definition without weights."""
        return self.base_model in SCRATCH


def parse(config: Mapping[str, Any]) -> Yolo11Config:
    """Validate a job's config; raises `InvalidJobError` that names each wrong key and its range."""
    parsed, options = training_config.parse(config, Yolo11Config, Yolo11Options)
    gpus, batch = parsed.gpus_wanted, options.batch
    if batch < gpus:
        raise InvalidJobError(f"config.batch_size: {batch} is less than one picture for each of {gpus} GPUs")
    return parsed.model_copy(update={"options": options})
