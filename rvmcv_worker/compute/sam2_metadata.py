"""What a fine-tuned SAM2 model says of itself beside its weights: plain values, nothing about the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from rvmcv_worker import framing
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.errors import ModelInvalidError
from rvmcv_worker.sam2_options import Trained

#: Edge that SAM 2.1 was trained at, in pixels.
IMAGE_PX = 1024
#: Meta's default.
MULTIMASK_FALLBACK = True

#: Largest metadata as JSON: as much as a result may have, which has the same metrics.
MAX_BYTES = 16 * 1024 * 1024

ImagePx = Annotated[int, Field(ge=64, le=1024, multiple_of=32)]


class Sam2Metadata(BaseModel):
    """The entries of a ``best.pt`` but for ``model``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    #: The architecture, one of `sam2_options.ARCHITECTURES`.
    config: str
    #: Name or version of the model that the training began with, and its file's sha256; none from scratch.
    base_model: str
    base_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    #: Edge that images are stretched to, in pixels: masks are best at the one that was trained with.
    image_px: ImagePx
    trained: Trained
    classes: list[str]
    metrics: dict[str, JsonValue]
    versions: dict[str, str | None]
    #: Whether a box's mask may be another of the decoder's four where the first is not stable.
    multimask_fallback: bool
    #: Epochs that were trained for these weights.
    epochs: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _bounded(self) -> Sam2Metadata:
        if (size_bytes := len(self._json())) > MAX_BYTES:
            raise ValueError(f"{size_bytes} bytes as JSON, more than {MAX_BYTES}")
        return self

    def plain(self) -> dict[str, Any]:
        """Return it as dicts, lists, text and numbers, of which equal ones make equal pickles."""
        return dict(json.loads(self._json()))

    def _json(self) -> str:
        """Return it without numbers that are not finite; half a character, which JSON can have, stays."""
        return json.dumps(framing.finite(self.model_dump()), allow_nan=False)


def parse(found: Mapping[str, Any], name: str) -> Sam2Metadata:
    """Return what the file `name` holds beside its weights; raise `ModelInvalidError` unless it is ours."""
    try:
        return Sam2Metadata.model_validate(dict(found))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = printable(".".join(str(part) for part in first["loc"])) or "its metadata"
        raise ModelInvalidError(
            f"{name} is not as a SAM2 training of ours writes it: {where}: {printable(first['msg'])}"
        ) from None


class Served(NamedTuple):
    """How a model is used, as far as its file has a say."""

    image_px: int
    multimask_fallback: bool


def served(found: Mapping[str, Any], name: str) -> Served:
    """Return what the file `name`, a stranger's, says of its use beside its weights; Meta's does not.

    Raises `ModelInvalidError`.
    """
    image_px = found.get("image_px", IMAGE_PX)
    if type(image_px) is not int or image_px % 32 or not 64 <= image_px <= 1024:
        raise ModelInvalidError(
            f"{name} says that its image_px is {shown(image_px)}; save it with the edge in pixels that it "
            "was trained at, a multiple of 32 from 64 to 1024, or without for 1024"
        )
    fallback = found.get("multimask_fallback", MULTIMASK_FALLBACK)
    if type(fallback) is not bool:
        raise ModelInvalidError(
            f"{name} says that its multimask_fallback is {shown(fallback)}; save it with True or False, or "
            "without for True"
        )
    return Served(image_px, fallback)


def shown(value: object) -> str:
    """Return a stranger's value as text that fits in a message."""
    if isinstance(value, (str, int, float, type(None))):
        return printable(repr(value), 60)
    return f"a {type(value).__name__}"
