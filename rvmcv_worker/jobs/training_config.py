"""The config of a YOLO11 training job: the plan's fields, and the options of a practitioner.

Ranges and names are Ultralytics' own (8.4); a test compares them with the installed library. An
option may be called as the plan or as Ultralytics calls it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from loguru import logger
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.protocol import Sha256

Fraction = Annotated[float, Field(ge=0, le=1)]
Gain = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Degrees = Annotated[float, Field(ge=-180, le=180)]
#: A data set's class name: what a person can read, and no more.
ClassName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]
#: A model as RVM-Server calls it: a version, a file name or a sha256; never a path.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

#: Model definitions for a start from scratch.
SCRATCH = frozenset(f"yolo11{size}{task}.yaml" for size in "nsmlx" for task in ("", "-seg"))
#: Keys of the plan's YAML that are the worker's to set; ignored with a warning.
OURS = frozenset({"project", "name", "exist_ok", "data", "save"})
#: Mistakes of a config that its error names.
_MOST_EXPLAINED = 20
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
        logger.warning("config.cache: 'disk' is not to be had behind the wall: trained without a cache")
        return False
    return value


def _gpu_count(value: Any) -> Any:
    """Read `device` as a count: which GPUs they are is the worker's to choose."""
    if isinstance(value, int) and not isinstance(value, bool):
        return 1
    if isinstance(value, str):
        value = [part for part in value.strip("[]").split(",") if part.strip()]
    if not isinstance(value, list) or not value or not all(re.fullmatch(r"\s*\d+\s*", str(i)) for i in value):
        raise ValueError("must name GPUs, as in 0 or '0,1'")
    return len(value)


class TrainingOptions(BaseModel):
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

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, values: Any) -> Any:
        for ours, theirs in (("img_size", "imgsz"), ("batch_size", "batch")):
            if isinstance(values, dict) and ours in values and theirs in values:
                if values[ours] != values[theirs]:
                    raise ValueError(f"{ours} and {theirs} mean the same and differ")
                values = {key: value for key, value in values.items() if key != theirs}
        return values


class GpuWish(BaseModel):
    """How many GPUs a training asks for, by the protocol's key or by Ultralytics'."""

    gpus: Annotated[int, Field(ge=1, le=64)] = 1
    device: Annotated[int, BeforeValidator(_gpu_count)] | None = None


def gpus_wanted(config: Mapping[str, Any]) -> int:
    """Return how many GPUs a config asks for; 1 where it does not say it validly, which `parse` refuses."""
    try:
        wish = GpuWish.model_validate({key: config[key] for key in GpuWish.model_fields if key in config})
    except ValidationError:
        return 1
    return wish.device or wish.gpus


class TrainingConfig(GpuWish):
    """Everything a training job's config can say beside Ultralytics' options."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True, protected_namespaces=()
    )

    dataset_id: Annotated[int, Field(ge=0)] | None = None
    dataset_url: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    dataset_sha256: Sha256 | None = None
    base_model: Annotated[ModelName, Field(validation_alias=AliasChoices("base_model", "model"))] = (
        "yolo11n.pt"
    )
    base_model_sha256: Annotated[
        Sha256 | None, Field(validation_alias=AliasChoices("base_model_sha256", "model_sha256"))
    ] = None
    active_model_sha256: Sha256 | None = None
    task: Literal["detect", "segment"] | None = None
    names: Annotated[list[ClassName], Field(min_length=1, max_length=10_000)] | None = None
    time_limit_h: Annotated[
        float | None, Field(gt=0, le=10_000, validation_alias=AliasChoices("time_limit_h", "time"))
    ] = None
    #: When the GPU's memory does not even hold a batch of 1.
    allow_smaller_img_size: bool = False
    callback_url: str | None = None
    options: TrainingOptions = TrainingOptions()

    @model_validator(mode="after")
    def _has_a_data_set(self) -> TrainingConfig:
        if self.dataset_id is None and self.dataset_url is None:
            raise ValueError("dataset_id or dataset_url is missing")
        return self

    @property
    def label_task(self) -> str:
        """``detect`` or ``segment``: as said, else by the base model's name."""
        return self.task or ("segment" if "-seg" in self.base_model else "detect")

    @property
    def from_scratch(self) -> bool:
        """Whether the base model is a definition without weights."""
        return self.base_model in SCRATCH


def _names_of(model: type[BaseModel]) -> set[str]:
    """Return every name under which the fields of `model` can be given."""
    names = set(model.model_fields)
    for field in model.model_fields.values():
        if isinstance(field.validation_alias, AliasChoices):
            names |= {str(choice) for choice in field.validation_alias.choices}
    return names


_OPTION_NAMES = _names_of(TrainingOptions)
_CONFIG_NAMES = _names_of(TrainingConfig) - {"options"}


def parse(config: Mapping[str, Any]) -> TrainingConfig:
    """Validate a job's config; raises `InvalidJobError` that names each wrong key and its range."""
    ignored = sorted(OURS & set(config))
    if ignored:
        logger.warning("config: {} is the worker's to set: ignored", ", ".join(ignored))
    options: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in config.items():
        if key in OURS:
            continue
        if key in _OPTION_NAMES:
            options[key] = value
        elif key in _CONFIG_NAMES:
            rest[key] = value
        else:
            near = difflib.get_close_matches(str(key), _OPTION_NAMES | _CONFIG_NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            wrong.append(f"config.{str(key)[:64]}: no such option{hint}")
    parsed: dict[type[BaseModel], BaseModel] = {}
    for model, values in ((TrainingOptions, options), (TrainingConfig, rest)):
        try:
            parsed[model] = model.model_validate(values)
        except ValidationError as error:
            wrong += explain(error, config)
    if wrong:
        raise InvalidJobError("; ".join(wrong))
    training, training_options = parsed[TrainingConfig], parsed[TrainingOptions]
    assert isinstance(training, TrainingConfig)
    assert isinstance(training_options, TrainingOptions)
    gpus, batch = training.device or training.gpus, training_options.batch
    if batch < gpus:
        raise InvalidJobError(f"config.batch_size: {batch} is less than one picture for each of {gpus} GPUs")
    return training.model_copy(update={"options": training_options})


def explain(error: ValidationError, config: Mapping[str, Any]) -> list[str]:
    """Say of each wrong key, up to `_MOST_EXPLAINED`, what is wrong with it, and what it is."""
    said = []
    for item in error.errors(include_url=False, include_context=False)[:_MOST_EXPLAINED]:
        key = ".".join(str(part)[:64] for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        shown = f" (it is {str(config[key])[:60]!r})" if key in config else ""
        said.append(f"config.{key}: {text}{shown}" if key else f"config: {text}")
    return list(dict.fromkeys(said))
