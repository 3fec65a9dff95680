"""Encoded images of every kind, and what becomes of them."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rvmcv_worker.compute.image_decode import decode
from rvmcv_worker.errors import ImageInvalidError
from tests.dataset_fixtures import draw

MAX_PIXELS = 1_000_000
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
#: Width, height.
SIZE = (60, 40)


def quarters() -> Image.Image:
    """Red, green, blue, black: top left, top right, bottom left, bottom right."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[:20, :30], pixels[:20, 30:], pixels[20:, :30] = RED, GREEN, BLUE
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def corners(content: bytes) -> list[tuple[int, ...]]:
    """Return the four quarters' colours as RGB, clockwise from the top left, without what JPEG adds."""
    image = decode(content, MAX_PIXELS)
    assert image.dtype == np.uint8
    assert image.ndim == 3
    height, width, _ = image.shape
    places = [(5, 5), (5, width - 6), (height - 6, width - 6), (height - 6, 5)]
    return [tuple(int(round(value / 15) * 15) for value in image[place][::-1]) for place in places]


FORMS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 95},
    "BMP": {},
    "JPEG2000": {},
}
#: EXIF orientation -> the quarters, clockwise from the top left, as a viewer shows them.
TURNS = {
    1: [RED, GREEN, BLACK, BLUE],
    2: [GREEN, RED, BLUE, BLACK],
    3: [BLACK, BLUE, RED, GREEN],
    4: [BLUE, BLACK, GREEN, RED],
    5: [RED, BLUE, BLACK, GREEN],
    6: [BLUE, RED, GREEN, BLACK],
    7: [BLACK, GREEN, RED, BLUE],
    8: [GREEN, BLACK, BLUE, RED],
}


@pytest.mark.parametrize("form", FORMS)
def test_each_format_is_read(form: str) -> None:
    assert corners(encoded(quarters(), form, **FORMS[form])) == TURNS[1]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_is_turned_as_its_exif_says(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(quarters(), form, exif=exif, **FORMS[form])
    assert corners(content) == TURNS[orientation]
    turned = orientation >= 5
    assert decode(content, MAX_PIXELS).shape == ((60, 40, 3) if turned else (40, 60, 3))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "BMP"])
def test_grey_becomes_three_equal_channels(form: str) -> None:
    image = decode(encoded(quarters().convert("L"), form), MAX_PIXELS)
    assert image.shape == (40, 60, 3)
    assert np.ptp(image.astype(int), axis=2).max() <= 2
    assert abs(int(image[5, 5, 0]) - 76) <= 2


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("P", "PNG"),
        ("P", "BMP"),
        ("P", "TIFF"),
        ("RGBA", "PNG"),
        ("RGBA", "TIFF"),
    ],
)
def test_colours_are_kept_whatever_they_are_written_as(mode: str, form: str) -> None:
    assert corners(encoded(quarters().convert(mode), form)) == TURNS[1]


def test_what_is_transparent_keeps_its_colour() -> None:
    image = quarters()
    image.putalpha(Image.new("L", SIZE, 0))
    assert corners(encoded(image, "PNG")) == TURNS[1]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_eight_are_kept(form: str) -> None:
    grey = np.asarray(quarters().convert("L")).astype(np.uint16) * 256 + 200
    image = decode(encoded(Image.fromarray(grey), form), MAX_PIXELS)
    assert np.array_equal(image[..., 0], grey >> 8)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_of_several_pictures_the_first_is_taken(form: str) -> None:
    second = Image.new("RGB", SIZE, (90, 90, 90))
    options = {**FORMS[form], "save_all": True, "append_images": [second]}
    assert corners(encoded(quarters(), form, **options)) == TURNS[1]


def png_of(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "not an image of a known format"),
        (b"%PDF-1.7 and so on", "not an image of a known format"),
        (b"BM and then rubbish" * 9, "image"),
        (b"MM\x00*rubbish rubbish rubbish", "image"),
        (b"\xff\xd8\xff\xe0 rubbish" * 20, "image"),
        (encoded(quarters(), "GIF"), "a GIF; convert it to PNG"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC or a video; convert it to JPEG"),
        (png_of(50_000, 50_000), "more pixels than the worker takes (50000 x 50000)"),
        (png_of(1001, 1000), "1001 x 1000"),
        (png_of(100, 100), "cannot be decoded to its end"),
        (draw(1, size=(9, 40)), "a side shorter than 10 pixels (9 x 40)"),
        (bytes(10_000_000), "a file of 10000000 bytes"),
        (encoded(quarters().convert("F"), "TIFF"), "floating point"),
    ],
)
def test_what_cannot_be_read_is_told(content: bytes, told: str) -> None:
    with pytest.raises(ImageInvalidError) as raised:
        decode(content, MAX_PIXELS)
    assert told in raised.value.message


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_that_is_cut_off_is_told(form: str) -> None:
    content = encoded(Image.open(io.BytesIO(draw(3, size=(300, 200)))), form, **FORMS[form])
    decode(content, MAX_PIXELS)
    for length in (len(content) // 10, len(content) // 2, len(content) - 2):
        with pytest.raises(ImageInvalidError):
            decode(content[:length], MAX_PIXELS)


def test_a_picture_that_is_too_large_takes_no_memory() -> None:
    content = png_of(50_000, 50_000)
    tracemalloc.start()
    with pytest.raises(ImageInvalidError):
        decode(content, MAX_PIXELS)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10_000_000


_WITH_ULTRALYTICS = """
import os, sys
from pathlib import Path
from rvmcv_worker.compute import ultralytics_env
ultralytics_env.isolate(Path(sys.argv[1]))
from ultralytics.utils import checks
checks.check_requirements = lambda *names, **_: print("installs", *names)
import ultralytics.utils.patches  # patches Image.open
from PIL import Image
from rvmcv_worker.compute.image_decode import decode
from rvmcv_worker.errors import ImageInvalidError
contents = [b"", b"BM" + bytes(300), b"\\xff\\xd8\\xff" + bytes(300), b"\\0\\0\\0\\x18ftypmif1" + bytes(300)]
for content in contents:
    try:
        decode(content, 1_000_000)
    except ImageInvalidError:
        print("refused")
try:
    Image.open(sys.argv[2])
except Exception:
    pass
"""


@pytest.mark.slow
def test_ultralytics_is_not_made_to_install_a_plug_in(tmp_path: Path) -> None:
    """As it would be by `Image.open`, which the last lines of the script prove."""
    (tmp_path / "no-image").write_bytes(b"rubbish")
    ran = subprocess.run(
        [sys.executable, "-c", _WITH_ULTRALYTICS, str(tmp_path), str(tmp_path / "no-image")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ran.stdout.split("\n") == [*["refused"] * 4, "installs pi-heif", ""]


def test_a_side_that_opencv_refuses_is_the_fault_of_the_image() -> None:
    content = encoded(Image.new("L", (1_100_000, 10)), "BMP")
    with pytest.raises(ImageInvalidError, match="no side may be longer"):
        decode(content, 100_000_000)
