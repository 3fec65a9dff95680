"""What the configs of all trainings have in common, and how one is read: the job's keys, and the options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from rvmcv_worker.config import ModelName
from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.events import Event, event
from rvmcv_worker.jobs.job_config import ClassName, explain, unknown
from rvmcv_worker.protocol import Sha256

#: Keys of the plan's YAML that are the worker's to set; ignored with a warning.
OURS = frozenset({"project", "name", "exist_ok", "data", "save"})


def _gpu_count(value: Any) -> Any:
    """Read `device` as a count: which GPUs they are is the worker's to choose."""
    if isinstance(value, int) and not isinstance(value, bool):
        return 1
    if isinstance(value, str):
        value = [part for part in value.strip("[]").split(",") if part.strip()]
    if not isinstance(value, list) or not value or not all(re.fullmatch(r"\s*\d+\s*", str(i)) for i in value):
        raise ValueError("must name GPUs, as in 0 or '0,1'")
    return len(value)


class GpuWish(BaseModel):
    """How many GPUs a training asks for, by the protocol's key or by Ultralytics'."""

    gpus: Annotated[int, Field(ge=1, le=64)] = 1
    device: Annotated[int, BeforeValidator(_gpu_count)] | None = None

    @property
    def gpus_wanted(self) -> int:
        """The count, by whichever key it was given."""
        return self.device or self.gpus


def gpus_wanted(config: Mapping[str, Any]) -> int:
    """Return how many GPUs a config asks for; 1 where it does not say it validly, which `parse` refuses."""
    try:
        wish = GpuWish.model_validate({key: config[key] for key in GpuWish.model_fields if key in config})
    except ValidationError:
        return 1
    return wish.gpus_wanted


class TrainingConfig(GpuWish):
    """What any training job's config can say beside its options."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True, protected_namespaces=()
    )

    dataset_id: Annotated[int, Field(ge=0)] | None = None
    dataset_url: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    dataset_sha256: Sha256 | None = None
    base_model: Annotated[ModelName, Field(validation_alias=AliasChoices("base_model", "model"))]
    base_model_sha256: Annotated[
        Sha256 | None, Field(validation_alias=AliasChoices("base_model_sha256", "model_sha256"))
    ] = None
    active_model_sha256: Sha256 | None = None
    names: Annotated[list[ClassName], Field(min_length=1, max_length=10_000)] | None = None
    time_limit_h: Annotated[
        float | None, Field(gt=0, le=10_000, validation_alias=AliasChoices("time_limit_h", "time"))
    ] = None
    #: Whether the weights are delivered in that format too, beside `best.pt`.
    safetensors: bool = False
    #: Never called: reports go to the configured server only.
    callback_url: str | None = None

    @model_validator(mode="after")
    def _has_a_data_set(self) -> TrainingConfig:
        if self.dataset_id is None and self.dataset_url is None:
            raise ValueError("dataset_id or dataset_url is missing")
        return self


Options = TypeVar("Options", bound=BaseModel)
Config = TypeVar("Config", bound=TrainingConfig)


def parse(config: Mapping[str, Any], model: type[Config], options: type[Options]) -> tuple[Config, Options]:
    """Validate a job's config; raises `InvalidJobError` that names each wrong key and its range."""
    ignored = sorted(OURS & set(config))
    if ignored:
        event(Event.JOB_OPTION_IGNORED).warning(
            "config: {} is the worker's to set: ignored; whoever makes such jobs may leave it out",
            ", ".join(ignored),
        )
    of_options, of_model = _spellings(options), _spellings(model)
    of_model.pop("options", None)
    given: dict[type[BaseModel], dict[str, tuple[str, Any]]] = {options: {}, model: {}}
    wrong: list[str] = []
    for key, value in config.items():
        if key in OURS:
            continue
        owner = options if key in of_options else model
        field = of_options.get(key) or of_model.get(key)
        if field is None:
            wrong.append(unknown(str(key), [*of_options, *of_model]))
            continue
        before = given[owner].setdefault(field, (key, value))
        if before[0] != key and before[1] != value:
            wrong.append(f"config: {before[0]} and {key} mean the same and differ")
    parsed: dict[type[BaseModel], Any] = {}
    for kind, values in given.items():
        try:
            parsed[kind] = kind.model_validate(dict(values.values()))
        except ValidationError as error:
            wrong += explain(error, config)
    if wrong:
        raise InvalidJobError("; ".join(wrong))
    return parsed[model], parsed[options]


def _spellings(model: type[BaseModel]) -> dict[str, str]:
    """Return every name under which a field of `model` can be given, with the field."""
    return {name: field for field in model.model_fields for name in _names_of(model, field)}


def _names_of(model: type[BaseModel], field: str) -> Iterator[str]:
    yield field
    alias = model.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        yield from (str(choice) for choice in alias.choices)
