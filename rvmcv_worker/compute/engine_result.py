"""What an engine answers for one image: detections with their masks, as JSON within the wire's bounds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvmcv_worker.compute import masks as mask_values
from rvmcv_worker.compute.found import Found
from rvmcv_worker.engine_wire import MAX_PICTURE_BYTES, MAX_RESULT_BYTES, MaskFormat
from rvmcv_worker.errors import ModelInvalidError, UnsupportedJobError


class ResultWriter:
    """Puts the result of one image together; raises as soon as it is too large."""

    def __init__(self, found: Found, names: list[str], mask_format: MaskFormat) -> None:
        if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
            raise ModelInvalidError("the model answers with numbers that are not finite; train it anew")
        # The daemon takes an engine that says such things for one that was taken over.
        upright = (found.boxes[:, :2] <= found.boxes[:, 2:]).all()
        if not (upright and (found.scores >= 0).all() and (found.scores <= 1).all()):
            raise ModelInvalidError(
                "the model answers with boxes or confidences that no YOLO11 can; "
                "upload the best.pt of a training, as it was written"
            )
        self._detections: list[dict[str, Any]] = [
            # float32 to float is exact: nothing is rounded
            {"class": names[number], "confidence": score, "bbox": box}
            for number, score, box in zip(
                found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True
            )
        ]
        self._mask_format = mask_format
        self._masks_bytes = 0
        #: Seconds that it took to make masks, and to write them down.
        self.segment_s = 0.0
        self.encode_s = 0.0

    def with_masks(self, masks: Iterable[NDArray[np.bool_]]) -> Iterator[NDArray[np.bool_]]:
        """Write down each mask as it passes by, one for each detection; no two need be in memory."""
        source = iter(masks)
        for detection in self._detections:
            started_s = time.monotonic()
            mask = next(source)
            made_s = time.monotonic()
            detection["segmentation"] = mask_values.encode(mask, self._mask_format)
            self._masks_bytes += len(json.dumps(detection["segmentation"]))
            self._refuse_over(self._masks_bytes)
            self.segment_s += made_s - started_s
            self.encode_s += time.monotonic() - made_s
            yield mask

    def to_json(self, about: dict[str, Any]) -> bytes:
        """Return the result: `about` the image and the run, then the detections."""
        text = json.dumps({**about, "detections": self._detections}, allow_nan=False, separators=(",", ":"))
        result = text.encode()
        self._refuse_over(len(result))
        return result

    def _refuse_over(self, size_bytes: int) -> None:
        if size_bytes > MAX_RESULT_BYTES:
            raise UnsupportedJobError(
                f"the result of {len(self._detections)} detections takes more than "
                f"{MAX_RESULT_BYTES // 1024**2} MiB; ask for masks as rle or polygon, "
                "for fewer max_detections, or send a smaller image"
            )


def refuse_large_picture(picture: bytes) -> None:
    """Raise `UnsupportedJobError` for a drawn picture that the wire does not take."""
    if len(picture) > MAX_PICTURE_BYTES:
        raise UnsupportedJobError(
            f"the annotated picture has {len(picture)} bytes, more than {MAX_PICTURE_BYTES}; "
            "send a smaller image, or leave `annotated` out"
        )
