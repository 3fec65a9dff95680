"""Masks as others make them: with the `sam2` package alone, nothing of ours."""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor

#: Edge of the square, in pixels; the predictor knows 1024 alone, unless it is told the sizes of the features.
EDGE_PX = 128


def logits(model: SAM2Base) -> NDArray[np.float32]:
    """Return (6, 48, 64) logits: of three boxes one mask each, of one click three."""
    predictor = SAM2ImagePredictor(model)
    predictor._bb_feat_sizes = [(EDGE_PX // part, EDGE_PX // part) for part in (4, 8, 16)]
    predictor.set_image(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    boxes = np.array([(4, 4, 40, 30), (10, 2, 20, 44), (0, 0, 64, 48)])
    with_boxes, _, _ = predictor.predict(box=boxes, multimask_output=False, return_logits=True)
    point, kind = np.array([(30, 20)]), np.array([1])
    with_click, _, _ = predictor.predict(point, kind, multimask_output=True, return_logits=True)
    return np.concatenate([with_boxes[:, 0], with_click])


if __name__ == "__main__":
    config, checkpoint, target = sys.argv[1:]
    build_sam2(config, checkpoint, device="cpu")  # as it is, strictly
    small = [f"++model.image_size={EDGE_PX}"]
    np.save(target, logits(build_sam2(config, checkpoint, device="cpu", hydra_overrides_extra=small)))
