"""One image: is it fit for a training or a detection, and what does it look like in 64 bits?"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from rvmcv_worker.compute.faults import Effect, Fault, FaultKind

#: How the formats that Ultralytics accepts begin, at which offset, and Pillow's names for them (DNG opens as
#: TIFF, MPO as JPEG). No other decoder is entered.
_SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"BM", "BMP"),
    (8, b"WEBP", "WEBP"),
    (0, b"II", "TIFF"),
    (0, b"MM", "TIFF"),
    (4, b"ftypavi", "AVIF"),  # one picture or several
    (4, b"ftypmif1", "AVIF"),
    (0, b"\0\0\0\x0cjP  ", "JPEG2000"),  # in a file and bare
    (0, b"\xff\x4f\xff\x51", "JPEG2000"),
)
_MIN_SIDE = 10
_START_OF_JPEG, _END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"
#: What an uncompressed image takes at most for each pixel.
_MAX_BYTES_PER_PIXEL = 8
_DHASH_SIZE = (9, 8)
#: Of how many pixels Pillow's `Image.open` opens an image at most; it is what a training uses.
_PILLOW_MAX_PIXELS = 2 * (1024**3 // 4 // 3)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What was found out about an image."""

    #: dHash: bit set where a pixel of the 9 x 8 thumbnail is brighter than its right neighbour.
    #: None for a bad image, and for one so even that the hash tells nothing.
    dhash: int | None
    fault: Fault | None = None
    #: New content for a JPEG that had to be restored.
    restored: bytes | None = None

    @property
    def bad(self) -> bool:
        """Whether the image has to be left out."""
        return self.fault is not None and self.fault.kind.effect is Effect.IMAGE


def inspect_image(content: bytes, max_pixels: int) -> ImageFacts:
    """Return the facts of the image that `content` holds; never raises for what an image may contain."""
    fault = inspect_header(content, min(max_pixels, _PILLOW_MAX_PIXELS))
    if fault:
        return ImageFacts(dhash=None, fault=fault)
    try:
        dhash = _dhash(content)
        if content.startswith(_START_OF_JPEG) and not content.endswith(_END_OF_JPEG) and not _is_mpo(content):
            return ImageFacts(dhash, Fault(FaultKind.RESTORED), _restored(content))
    except Exception as error:  # noqa: BLE001 a decoder fed by a stranger raises anything
        return ImageFacts(dhash=None, fault=Fault(FaultKind.TRUNCATED, str(error)))
    return ImageFacts(dhash)


def inspect_header(content: bytes, max_pixels: int) -> Fault | None:
    """Judge what can be told before a pixel is decoded."""
    if len(content) > max_pixels * _MAX_BYTES_PER_PIXEL + 1024 * 1024:
        return Fault(FaultKind.TOO_LARGE, f"a file of {len(content)} bytes")
    try:
        with open_image(content) as image:
            width, height = image.size
            if width * height > max_pixels:
                return Fault(FaultKind.TOO_LARGE, f"{width} x {height}")
            if min(width, height) < _MIN_SIDE:
                return Fault(FaultKind.TOO_SMALL, f"{width} x {height}")
            image.verify()
    except UnidentifiedImageError:
        return Fault(FaultKind.NOT_AN_IMAGE, _hint(content))
    except Exception as error:  # noqa: BLE001 as above
        return Fault(FaultKind.TRUNCATED, str(error))
    return None


def format_of(content: bytes) -> str | None:
    """Return Pillow's name of the format that `content` begins as, if it is one that is accepted."""
    found = (name for offset, signature, name in _SIGNATURES if content.startswith(signature, offset))
    return next(found, None)


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Open an image of an accepted format; raises `UnidentifiedImageError` for anything else.

    Not by `Image.open`: Ultralytics, where loaded, makes that install a plug-in for what it does not know.
    """
    Image.init()
    name = format_of(content)
    if name not in Image.OPEN:
        raise UnidentifiedImageError
    decoder, _ = Image.OPEN[name]
    try:
        return decoder(io.BytesIO(content), "")
    except (SyntaxError, IndexError, TypeError, struct.error) as error:  # Pillow's ways to say: not mine
        raise UnidentifiedImageError from error


def _is_mpo(content: bytes) -> bool:
    """Whether a JPEG holds several pictures; Ultralytics leaves those as they are."""
    with open_image(content) as image:
        return image.format == "MPO"


def _hint(content: bytes) -> str:
    if not content:
        return "the file is empty"
    if content[4:8] == b"ftyp":
        return "HEIC or a video; convert it to JPEG"
    if content.startswith(b"GIF8"):
        return "a GIF; convert it to PNG"
    return "accepted: JPEG, PNG, BMP, WebP, TIFF, AVIF, JPEG 2000"


def _dhash(content: bytes) -> int | None:
    """Decode to the end, at an eighth of the size where the format can, and hash."""
    with open_image(content) as image:
        image.draft("L", (72, 64))
        small = image.convert("L").resize(_DHASH_SIZE, Image.Resampling.LANCZOS)
    pixels = np.asarray(small, dtype=np.int16)
    if int(pixels.max()) - int(pixels.min()) < 8:  # near uniform: compression noise decides the bits
        return None
    return int.from_bytes(np.packbits(pixels[:, :-1] > pixels[:, 1:]).tobytes(), "big")


def _restored(content: bytes) -> bytes:
    """Write the JPEG anew as Ultralytics' `check_image` does, which it could not do behind the wall."""
    out = io.BytesIO()
    with open_image(content) as image:
        ImageOps.exif_transpose(image).save(out, "JPEG", subsampling=0, quality=100)
    return out.getvalue()
