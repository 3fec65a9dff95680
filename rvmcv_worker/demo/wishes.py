"""What a person wishes of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wishes:
    """None: as the demo thinks best."""

    #: A folder or zip; None: one is drawn.
    dataset: Path | None = None
    #: Of each training.
    epochs: int | None = None
    #: Side of the training images, in pixels.
    img_size: int | None = None
    #: A checkpoint of SAM2.1, for masks.
    sam2: Path | None = None
    #: Whether SAM2 is fine-tuned too, from `sam2` or from random weights.
    segment: bool = False
