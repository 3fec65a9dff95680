"""The config of a batch: the options of an inference, and the list of its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from rvmcv_worker import manifest
from rvmcv_worker.jobs import inference_config
from rvmcv_worker.jobs.inference_config import InferenceOptions, Url
from rvmcv_worker.protocol import Sha256

#: What a result depends on, and so does whether an earlier attempt's parts go together with it.
_ASKED = ("confidence_threshold", "iou_threshold", "img_size", "max_detections", "mask_format", "annotated")


class BatchConfig(InferenceOptions):
    """Everything that a batch's config can say."""

    #: Not looked into here: one bad entry is an error line of the result, as in a manifest.
    images: Annotated[list[Any], Field(min_length=1, max_length=manifest.MAX_IMAGES)] | None = None
    manifest_url: Url | None = None
    manifest_sha256: Sha256 | None = None
    part_size: Annotated[int, Field(ge=1, le=10_000)] = 1000

    @model_validator(mode="after")
    def _has_one_list(self) -> BatchConfig:
        if (self.images is None) == (self.manifest_url is None):
            raise ValueError("one of images and manifest_url must be given, and only one")
        if self.manifest_sha256 is not None and self.manifest_url is None:
            raise ValueError("manifest_sha256 goes with manifest_url only")
        return self

    def asked(self) -> dict[str, Any]:
        """Return the options that a result depends on."""
        return self.model_dump(mode="json", include=set(_ASKED))


def parse(config: Mapping[str, Any]) -> BatchConfig:
    """Validate a job's config; raises `InvalidJobError` that names each wrong key and its range."""
    return inference_config.parse(BatchConfig, config)
