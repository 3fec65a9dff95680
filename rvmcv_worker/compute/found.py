"""What a detector finds in one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rvmcv_worker.compute.packed_masks import PackedMasks


@dataclass(frozen=True)
class Found:
    """Detections of one image, best first, n of them."""

    #: (n, 4) float32, ``x1, y1, x2, y2`` in pixels of the image as it was given.
    boxes: NDArray[np.float32]
    #: (n,) float32, 0 to 1.
    scores: NDArray[np.float32]
    #: (n,) int64, indexes into the model's names.
    classes: NDArray[np.int64]
    #: n of (height, width), of a YOLO11-seg model that was asked for masks; else None.
    masks: PackedMasks | None = None
