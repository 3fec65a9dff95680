"""What the daemon and an engine say to each other, over one stream socket, in frames (`framing.py`).

The daemon sends requests, each with the encoded image as payload. The engine answers, in any order:

    {"ready": true, "device": "cpu", "versions": {…}}         once, when it takes requests
    {"id": 7, "stage": "decode" | "load" | "infer"}           what it does with a request now
    {"id": 7, "ok": true, "picture_bytes": 0}                 payload: the result as JSON, then its picture
    {"id": 7, "ok": false, "error": {"code", "message"}}

What an engine says is untrusted: the daemon bounds and validates all of it. The end of the stream ends it.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any

#: Largest result, without its picture, in bytes: as `result.json` of a child.
MAX_RESULT_BYTES = 16 * 1024 * 1024
#: Largest drawn picture, in bytes.
MAX_PICTURE_BYTES = 64 * 1024 * 1024


class Trust(str, enum.Enum):
    """Whose models an engine runs; each class has a process of its own."""

    APPROVED = "approved"  #: models that an admin has activated
    OTHER = "other"  #: all others: playground, candidates, a stranger's


class Queue(str, enum.Enum):
    """How urgent a request is; interactive ones go first, always."""

    INTERACTIVE = "interactive"  #: somebody waits: a fraud check, a playground
    BATCH = "batch"  #: nobody does


class Stage(str, enum.Enum):
    """What an engine does with a request now; each stage has its own time limit."""

    DECODE = "decode"  #: the image is being decoded
    LOAD = "load"  #: its models are being loaded
    INFER = "infer"  #: it goes through them


class MaskFormat(str, enum.Enum):
    """How a mask is written in a result."""

    PNG = "png"  #: base64 of a 1-bit PNG of the whole image
    PNG_CROP = "png_crop"  #: {"png", "offset": [x, y], "size": [w, h]}: a 1-bit PNG of the mask's box alone
    RLE = "rle"  #: {"size": [h, w], "counts"}: COCO's compressed run lengths
    POLYGON = "polygon"  #: [[x1, y1, x2, y2, …], …], pixels: outlines, holes left out


@dataclass(frozen=True)
class Backend:
    """What runs a detector, as measured for a model on this machine."""

    #: ``torch-cpu``, ``torch-cuda``, ``openvino``, ``onnxruntime``, ``tensorrt``.
    name: str
    #: ``fp32``, ``fp16``, ``bf16``.
    precision: str
    #: The export, a file or directory beneath the engine's root; None for torch, which runs the checkpoint.
    path: str | None = None


@dataclass(frozen=True)
class Model:
    """A detector as the engine finds it."""

    sha256: str
    #: The checkpoint, beneath the engine's root.
    path: str
    backend: Backend


@dataclass(frozen=True)
class Segmenter:
    """A SAM2 checkpoint as the engine finds it."""

    sha256: str
    path: str


@dataclass(frozen=True)
class Options:
    """What is asked of the models."""

    confidence: float = 0.25
    #: IoU above which a weaker box of the same class is suppressed (NMS).
    iou: float = 0.7
    #: Edge of the letterboxed image in pixels; None is the size that the model was trained at.
    imgsz: int | None = None
    max_detections: int = 300
    #: Masks wanted: by `Request.segmenter`, or without one by the detector itself (YOLO11-seg).
    segmentation: bool = False
    mask_format: MaskFormat = MaskFormat.PNG
    #: Whether the image with boxes, labels and masks drawn is wanted too, as a JPEG.
    annotated: bool = False


@dataclass(frozen=True)
class Request:
    """One image's way through the engine; the encoded image is the frame's payload."""

    id: int
    queue: Queue
    model: Model
    options: Options = Options()
    segmenter: Segmenter | None = None

    def to_header(self) -> dict[str, Any]:
        """Return the frame's header."""
        return asdict(self)

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> Request:
        """Read what `to_header` wrote: the daemon's own words, on the engine's side."""
        model, options, segmenter = header["model"], header["options"], header["segmenter"]
        return cls(
            id=header["id"],
            queue=Queue(header["queue"]),
            model=Model(**{**model, "backend": Backend(**model["backend"])}),
            options=Options(**{**options, "mask_format": MaskFormat(options["mask_format"])}),
            segmenter=Segmenter(**segmenter) if segmenter else None,
        )
