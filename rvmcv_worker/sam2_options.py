"""How SAM2 is fine-tuned: what a job can say and the train child is given; for both sides of the wall."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

#: SAM 2.1's sizes.
ARCHITECTURES = tuple(f"sam2.1_hiera_{size}" for size in ("tiny", "small", "base_plus", "large"))
#: A start from random weights, as a base model is named.
SCRATCH = "scratch"

Fraction = Annotated[float, Field(ge=0, le=1)]
Trained = Literal["decoder", "decoder+neck", "all"]
CacheMode = Literal["auto", "disk", "ram", "off"]


class Sam2Options(BaseModel):
    """Called as YOLO11's options are, where they mean the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True)

    #: Mask decoder and prompt encoder; with the encoder's neck; everything that an image passes through.
    train: Trained = "decoder"
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 40
    #: Edge that images are stretched to, in pixels.
    imgsz: Annotated[
        int, Field(ge=64, le=1024, multiple_of=32, validation_alias=AliasChoices("img_size", "imgsz"))
    ] = 1024
    #: Images in one step of the optimizer.
    batch: Annotated[int, Field(ge=1, le=1024, validation_alias=AliasChoices("batch_size", "batch"))] = 4
    #: Most objects of an image in one step; others of it have their turn in other epochs.
    objects: Annotated[int, Field(ge=1, le=256)] = 16
    #: Epochs without a better val mIoU after which the training ends; 0 for never.
    patience: Annotated[int, Field(ge=0)] = 10
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    #: Where the output of the frozen part is kept.
    cache: CacheMode = "auto"
    #: Share of objects that are prompted with a box first, the others with a point.
    box_share: Fraction = 0.5
    #: Correction clicks after the first prompt.
    clicks: Annotated[int, Field(ge=0, le=8)] = 2
    #: Probability of a flip.
    fliplr: Fraction = 0.5
    flipud: Fraction = 0.0
    #: None: 5e-5; for `all` 5e-6; from scratch 1e-3.
    lr0: Annotated[float, Field(gt=0, le=1)] | None = None
    #: The last learning rate, as a fraction of the first.
    lrf: Fraction = 0.1
    weight_decay: Fraction = 0.1
    warmup_epochs: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 1.0
    #: Largest norm of a step's gradient.
    clip_norm: Annotated[float, Field(gt=0, le=1000)] = 0.1
