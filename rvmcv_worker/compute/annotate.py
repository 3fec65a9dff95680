"""What was found, drawn on the image for a person to look at: masks, boxes, labels with confidence.

The picture is made larger or smaller first, so that a label is legible on an image of 64 px and a JPEG of
8000 px is not too large to send.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import supervision
from numpy.typing import NDArray

from rvmcv_worker.compute.printable import printable
from rvmcv_worker.compute.ultralytics_env import any_font

#: The picture's longer edge, in pixels.
_MIN_EDGE_PX, _MAX_EDGE_PX = 640, 4096
#: 4096 x 4096 of pure noise are 18 MB; a photograph has a tenth of that.
_JPEG_QUALITY = 90
_MASK_OPACITY = 0.45
_MAX_NAME_CHARS = 40
#: Only the best have labels: more of them hide the picture, and moved apart they land far from their boxes.
_MAX_LABELS = 30

COLORS = supervision.ColorPalette.DEFAULT
#: Black or white for each of the colors, whichever is easier to read on it.
TEXT_COLORS = supervision.ColorPalette(
    [
        supervision.Color.BLACK
        if 0.299 * color.r + 0.587 * color.g + 0.114 * color.b > 128
        else supervision.Color.WHITE
        for color in COLORS.colors
    ]
)
_MASKS = supervision.MaskAnnotator(opacity=_MASK_OPACITY)


def draw(
    image: NDArray[np.uint8],
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    classes: NDArray[np.int64],
    names: list[str],
    masks: Iterable[NDArray[np.bool_]] | None,
) -> bytes:
    """Return a JPEG of the image, (height, width, 3) BGR, with n detections on it; the best lie on top.

    `boxes` (n, 4) and `masks`, one (height, width) for each box, are in the image's own pixels; masks are
    taken one by one.
    """
    scale = _scale(*image.shape[:2])
    picture = resized(image, scale)
    for class_id, mask in zip(classes, masks or ()):  # noqa: B905 - there may be none
        draw_mask(picture, int(class_id), mask)

    # Drawn in this order, so that weak ones do not hide good ones.
    order = np.argsort(scores, kind="stable")
    boxes = boxes.astype(np.float32).reshape(-1, 4) * np.float32(scale)
    height, width = picture.shape[:2]
    font_px = max(14, round(max(height, width) / 64))
    box_drawer = supervision.BoxAnnotator(thickness=max(2, font_px // 7))
    label_drawer = supervision.RichLabelAnnotator(
        color=COLORS,
        text_color=TEXT_COLORS,
        font_path=str(any_font()),
        font_size=font_px,
        text_padding=font_px // 4,
        smart_position=True,
    )
    picture = box_drawer.annotate(picture, _detections(boxes[order], classes[order]))
    named = order[-_MAX_LABELS:]
    labels = [_label(names[classes[index]], scores[index]) for index in named]
    picture = label_drawer.annotate(picture, _detections(boxes[named], classes[named]), labels)
    _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return encoded.tobytes()


def _scale(height: int, width: int) -> float:
    edge_px = max(height, width)
    return min(max(edge_px, _MIN_EDGE_PX), _MAX_EDGE_PX) / edge_px


def resized(image: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Return a copy, at least one pixel wide and high."""
    height, width = image.shape[:2]
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    resized: NDArray[np.uint8] = cv2.resize(
        image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    )
    return resized


def _detections(
    boxes: NDArray[np.float32], classes: NDArray[np.int64], masks: NDArray[np.bool_] | None = None
) -> supervision.Detections:
    return supervision.Detections(xyxy=boxes, class_id=classes.astype(int), mask=masks)


def draw_mask(picture: NDArray[np.uint8], class_id: int, mask: NDArray[np.bool_]) -> None:
    """Draw a mask where it is, not on the whole picture."""
    height, width = picture.shape[:2]
    pixels = cv2.resize(mask.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    left, top, mask_width, mask_height = cv2.boundingRect(pixels)
    inside = np.s_[top : top + mask_height, left : left + mask_width]
    box = np.array([(0, 0, mask_width, mask_height)], np.float32)
    _MASKS.annotate(
        picture[inside], _detections(box, np.array([class_id]), pixels[inside][None].astype(bool))
    )


def _label(name: str, score: float) -> str:
    """Return a label that fits: the middle of a long name is left out."""
    return f"{printable(name, _MAX_NAME_CHARS)} {score:.2f}".strip()
