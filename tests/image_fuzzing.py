"""Feeds damaged pictures of every accepted format to the decoders; a process, since they may crash in C.

    python -m tests.image_fuzzing SECONDS SEED

Each picture is written down before it is decoded, so that a crash leaves it behind.
"""

from __future__ import annotations

import io
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from rvmcv_worker.compute.image_decode import decode
from rvmcv_worker.compute.image_header import inspect_image
from rvmcv_worker.errors import ImageInvalidError
from tests.dataset_fixtures import draw
from tests.fuzzing import damage, no_hang

MAX_PIXELS = 200_000
#: The picture that is being decoded, in the working directory.
CURRENT = "current-picture"


def originals() -> Iterator[bytes]:
    """Yield a picture of each format, and some of odd kinds."""
    picture = Image.open(io.BytesIO(draw(1, (60, 40))))
    variants: list[tuple[str, Image.Image, dict[str, object]]] = [
        ("JPEG", picture, {}),
        ("JPEG", picture, {"progressive": True, "exif": _turned()}),
        ("JPEG", picture.convert("CMYK"), {}),
        ("PNG", picture, {}),
        ("PNG", picture.convert("P"), {}),
        ("PNG", picture.convert("I;16"), {}),
        ("BMP", picture, {}),
        ("WEBP", picture, {}),
        ("WEBP", picture, {"lossless": True}),
        ("TIFF", picture, {"compression": "tiff_lzw"}),
        ("TIFF", picture, {"compression": "tiff_adobe_deflate"}),
        ("TIFF", picture, {}),
        ("AVIF", picture, {}),
        ("JPEG2000", picture, {}),
    ]
    for form, image, options in variants:
        out = io.BytesIO()
        image.save(out, form, **options)
        yield out.getvalue()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def main() -> None:
    """Feed until the time is over; say how many were fed and how many were taken for pictures."""
    seconds, dice = float(sys.argv[1]), random.Random(int(sys.argv[2]))
    good = list(originals())
    for content in good:
        assert decode(content, MAX_PIXELS).shape in {(40, 60, 3), (60, 40, 3)}
    fed = taken = 0
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        content = damage(dice.choice(good), dice)
        Path(CURRENT).write_bytes(content)
        with no_hang():
            inspect_image(content, MAX_PIXELS)
            try:
                image = decode(content, MAX_PIXELS)
            except ImageInvalidError:
                pass
            else:
                assert image.shape[0] * image.shape[1] <= MAX_PIXELS
                taken += 1
        fed += 1
    sys.stdout.write(f"{fed} {taken}\n")


if __name__ == "__main__":
    main()
