"""One encoded image -> its pixels, as Ultralytics reads them and a viewer shows them.

OpenCV reads all but AVIF, as in Ultralytics' own `imread`: it turns by EXIF, makes three channels of grey,
palette and CMYK, 8 bits of 16, drops alpha, and takes the first picture of several. It does not turn AVIF.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from rvmcv_worker.compute.image_header import format_of, inspect_header, open_image
from rvmcv_worker.errors import ImageInvalidError


def decode(content: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Return an image as (height, width, 3) uint8, BGR.

    Raises `ImageInvalidError` for what is no image, damaged, cut off, or has more than `max_pixels`; the last
    is told by its header, before anything of that size is in memory.
    """
    if fault := inspect_header(content, max_pixels):
        raise ImageInvalidError(fault.reason)
    image = _decode_by_pillow(content) if format_of(content) == "AVIF" else _decode_by_opencv(content)
    height, width = image.shape[:2]
    if width * height > max_pixels:
        raise ImageInvalidError(f"the header says less, but {width} x {height} pixels were decoded")
    return image


def _decode_by_opencv(content: bytes) -> NDArray[np.uint8]:
    try:
        image: NDArray[np.uint8] | None = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise
        raise ImageInvalidError(
            f"the image cannot be decoded ({error.err}); no side may be longer than 1,048,576 px"
        ) from error
    if image is None:
        raise ImageInvalidError(
            "the image cannot be decoded to its end: cut off, damaged, or of a kind that is not read "
            "(such as floating point); send it as JPEG or PNG"
        )
    return image


def _decode_by_pillow(content: bytes) -> NDArray[np.uint8]:
    try:
        with open_image(content) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # a decoder fed by a stranger raises anything
        raise ImageInvalidError(f"the image cannot be decoded to its end: {error}") from error
    return cv2.cvtColor(np.asarray(upright), cv2.COLOR_RGB2BGR)  # type: ignore[no-any-return]
