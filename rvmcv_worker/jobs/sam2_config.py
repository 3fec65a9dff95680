"""The config of a SAM2 fine-tuning job: the keys of any training, and `sam2_options.Sam2Options`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from rvmcv_worker.config import ModelName
from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.jobs import training_config
from rvmcv_worker.jobs.training_config import TrainingConfig
from rvmcv_worker.sam2_options import SCRATCH, Sam2Options

Architecture = Literal[
    "sam2.1_hiera_tiny", "sam2.1_hiera_small", "sam2.1_hiera_base_plus", "sam2.1_hiera_large"
]
_SMALLEST: Architecture = "sam2.1_hiera_tiny"


class Sam2Config(TrainingConfig):
    """Everything a SAM2 job's config can say beside the options."""

    base_model: Annotated[ModelName, Field(validation_alias=AliasChoices("base_model", "model"))] = _SMALLEST
    #: Of a start from scratch; else the base model's tensors say it.
    architecture: Architecture | None = None
    options: Sam2Options = Sam2Options()

    @property
    def from_scratch(self) -> bool:
        """Whether it starts from random weights: for tests."""
        return self.base_model == SCRATCH

    @property
    def scratch_architecture(self) -> str | None:
        """What a start from scratch builds; None where a base model says it."""
        return (self.architecture or _SMALLEST) if self.from_scratch else None


def parse(config: Mapping[str, Any]) -> Sam2Config:
    """Validate a job's config; raises `InvalidJobError` that names each wrong key and its range."""
    parsed, options = training_config.parse(config, Sam2Config, Sam2Options)
    if wrong := "; ".join(_contradictions(parsed, options)):
        raise InvalidJobError(wrong)
    return parsed.model_copy(update={"options": options})


def _contradictions(config: Sam2Config, options: Sam2Options) -> Iterator[str]:
    """Say what is valid by itself and not together."""
    if config.gpus_wanted > 1:
        yield (
            f"config.{'device' if config.device else 'gpus'}: {config.gpus_wanted} GPUs are asked for, "
            "but SAM2 trains on one: leave it out"
        )
    if config.architecture is not None and not config.from_scratch:
        yield (
            f"config.architecture: goes with base_model {SCRATCH!r} only: {config.base_model} says by itself "
            "which of the four it is"
        )
    if config.base_model_sha256 is not None and config.from_scratch:
        yield f"config.base_model_sha256: base_model is {SCRATCH!r}, which is no file: leave it out"
    if options.train == "all" and options.cache in {"disk", "ram"}:
        yield (
            f"config.cache: {options.cache!r} has nothing to keep with train 'all', which trains the encoder "
            "too: leave it out, or train 'decoder' or 'decoder+neck'"
        )
