"""An image as SAM2's encoder takes it: stretched to a square, by ImageNet's mean and deviation.

The training and the inference share it: a model is served what it has learnt from.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import functional as vision

#: Mean and deviation of ImageNet's RGB, as SAM2 was trained with.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def square(image: NDArray[np.uint8], edge_px: int, device: torch.device) -> torch.Tensor:
    """Return a (height, width, 3) BGR image as (3, edge_px, edge_px) float32, resized on `device`.

    It is what `SAM2ImagePredictor.set_image` computes, bit for bit.
    """
    rgb = torch.from_numpy(image).flip(-1).permute(2, 0, 1).contiguous().float().div(255)
    stretched = vision.resize(rgb.to(device), [edge_px, edge_px], antialias=True)
    normalised: torch.Tensor = vision.normalize(stretched, _MEAN, _DEVIATION)
    return normalised
