"""What an engine answers, bounded and validated: a process that has opened strangers' files wrote it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rvmcv_worker import errors, framing
from rvmcv_worker.child_log import harmless, harmless_text
from rvmcv_worker.engine_wire import MAX_PICTURE_BYTES, MAX_RESULT_BYTES, MaskFormat, Options, Stage
from rvmcv_worker.errors import JobError
from rvmcv_worker.protocol import explain

#: Largest payload of a frame from an engine: the result, then the picture.
MAX_PAYLOAD_BYTES = MAX_RESULT_BYTES + MAX_PICTURE_BYTES

#: What an engine may say went wrong with a request. Other codes speak of what only the daemon does.
_CODES = frozenset(
    {"image_invalid", "model_invalid", "unsupported_job", "out_of_gpu_memory", "out_of_memory", "internal"}
)
#: Longest name of a class, a backend or a library, in characters.
_NAME_CHARS = 200
#: Most timings, and most libraries.
_MAX_ENTRIES = 30
#: Most outlines of a polygon mask (SAM2's 256 x 256 logits make up to 16,384 islands), and numbers of one.
_MAX_OUTLINES, _MAX_NUMBERS = 20_000, 1_000_000


class AnswerError(Exception):
    """An engine said what is not its to say: it counts as crashed."""


def _harmless(value: Any) -> Any:
    return harmless(value, _NAME_CHARS) if isinstance(value, str) else value


Name = Annotated[str, BeforeValidator(_harmless)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Side = Annotated[int, Field(ge=1, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")]
#: A list on the wire, which strict validation would not take for a tuple.
Size = Annotated[tuple[Side, Side], Field(strict=False)]
Outline = Annotated[list[Number], Field(max_length=_MAX_NUMBERS)]


class _Answered(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", hide_input_in_errors=True)


_Model = TypeVar("_Model", bound=_Answered)


class _Crop(_Answered):
    png: Base64
    offset: Annotated[tuple[int, int], Field(strict=False)]
    size: Size


class _Rle(_Answered):
    size: Size
    #: COCO's characters: 48 and up, six bits each.
    counts: Annotated[str, Field(pattern=r"^[0-o]*$")]


_Polygon = Annotated[list[Outline], Field(max_length=_MAX_OUTLINES)]
_SHAPES: dict[MaskFormat, type] = {
    MaskFormat.PNG: str,
    MaskFormat.PNG_CROP: _Crop,
    MaskFormat.RLE: _Rle,
    MaskFormat.POLYGON: list,
}


class _Detection(_Answered):
    class_: Annotated[Name, Field(alias="class")]
    confidence: Annotated[float, Field(ge=0, le=1)]
    bbox: Annotated[tuple[Number, Number, Number, Number], Field(strict=False)]
    segmentation: Base64 | _Crop | _Rle | _Polygon | None = None


class _Result(_Answered):
    image_size: Size
    detections: list[_Detection]
    backend: Name
    precision: Name
    batch: Annotated[int, Field(ge=1)]
    device: Name | None = None
    timings: Annotated[dict[Name, Seconds], Field(max_length=_MAX_ENTRIES)] = {}


class Ready(_Answered):
    """An engine takes requests."""

    ready: Literal[True]
    device: Name
    versions: Annotated[dict[Name, Name | None], Field(max_length=_MAX_ENTRIES)] = {}


class Said(_Answered):
    """A frame about a request: what is done with it now, or how it went."""

    id: int
    stage: Annotated[Stage | None, Field(strict=False)] = None
    ok: bool | None = None
    picture_bytes: Annotated[int, Field(ge=0, le=MAX_PICTURE_BYTES)] = 0
    error: dict[str, Any] = {}

    def to_error(self) -> JobError:
        """Return what the engine says is wrong with the request; raises `AnswerError`."""
        code, message = self.error.get("code"), harmless_text(str(self.error.get("message", "")))
        if not isinstance(code, str) or code not in _CODES:
            raise AnswerError(f"reported an error that is not its to report: {message}")
        return errors.from_code(code, message)


def read_ready(header: dict[str, Any]) -> Ready:
    """Read an engine's first frame; raises `AnswerError`."""
    return _validated(Ready, header)


def read_said(header: dict[str, Any]) -> Said:
    """Read any other frame; raises `AnswerError`."""
    said = _validated(Said, header)
    if (said.stage is None) == (said.ok is None):
        raise AnswerError("a frame is either about a stage or an answer")
    return said


def read_result(payload: bytes, picture_bytes: int, options: Options) -> tuple[dict[str, Any], bytes | None]:
    """Read an answer's payload, to what was asked; returns result and picture, or raises `AnswerError`."""
    if picture_bytes > len(payload) or (picture_bytes and not options.annotated):
        raise AnswerError(f"a picture of {picture_bytes} bytes in a payload of {len(payload)}")
    text, picture = payload[: len(payload) - picture_bytes], payload[len(payload) - picture_bytes :]
    if len(text) > MAX_RESULT_BYTES:
        raise AnswerError(f"a result of {len(text)} bytes")
    if picture and not picture.startswith(b"\xff\xd8"):
        raise AnswerError("a picture that is no JPEG")
    try:
        result = _validated(_Result, framing.parse_object(text))
    except framing.FramingError as error:
        raise AnswerError(f"a result that is {error}") from None
    if len(result.detections) > options.max_detections:
        raise AnswerError(f"{len(result.detections)} detections of at most {options.max_detections}")
    shape = _SHAPES[options.mask_format]
    width, height = result.image_size
    for found in result.detections:
        mask = found.segmentation
        if mask is not None and not (options.segmentation and isinstance(mask, shape)):
            raise AnswerError(f"a mask that is not {options.mask_format.value}, as was asked for")
        if isinstance(mask, _Crop) and not _lies_within(mask, width, height):
            raise AnswerError(f"a mask of {mask.size} at {mask.offset} in an image of {width} by {height}")
        if isinstance(mask, _Rle) and mask.size != (height, width):
            raise AnswerError(f"a mask of {mask.size} in an image of {height} rows and {width} columns")
        x1, y1, x2, y2 = found.bbox
        if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height):
            raise AnswerError(f"a box {found.bbox} outside of its image of {width} by {height}")
    return result.model_dump(mode="json", by_alias=True, exclude_none=True), picture or None


def _lies_within(crop: _Crop, width: int, height: int) -> bool:
    (left, top), (crop_width, crop_height) = crop.offset, crop.size
    return left >= 0 and top >= 0 and left + crop_width <= width and top + crop_height <= height


def _validated(model: type[_Model], value: dict[str, Any]) -> _Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise AnswerError(f"said what does not fit: {explain(error)}") from None
