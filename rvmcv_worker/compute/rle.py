"""COCO's run lengths: a mask as the lengths of its runs, column by column, the first of zeros.

In a COCO file they are a list of numbers or a string (LEB128-like, differences from the run before last).
Both are read here and not by pycocotools, whose C code takes a stranger's word for their sum and reads on
past the end of a string that is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Characters of 5 bits that one number of a string may take: 35 bits, more than any image has pixels.
_MAX_DIGITS = 7
_DIGIT_BITS = 5
_MORE, _SIGN, _DIGIT = 0x20, 0x10, 0x1F
#: So that no sum of differences leaves 64 bits.
_MAX_STRING_CHARS = 1 << 27


class RleError(ValueError):
    """Run lengths that are no mask of the size they are said to have; the message says why."""


@dataclass(frozen=True, slots=True)
class Rle:
    """A mask of height x width pixels as run lengths whose sum is their number."""

    height: int
    width: int
    #: (n,) uint32: zeros, ones, zeros, …
    counts: NDArray[np.uint32]

    @property
    def area(self) -> int:
        """Pixels of the object."""
        return int(self.counts[1::2].sum(dtype=np.int64))

    def mask(self, height: int, width: int) -> NDArray[np.bool_]:
        """Return the mask as (height, width), of another size by the nearest pixel."""
        values = np.arange(len(self.counts), dtype=np.uint8) & 1
        columns = np.repeat(values, self.counts).reshape(self.width, self.height)
        if (height, width) != (self.height, self.width):
            import cv2  # as in `Instance.mask`

            # Columns are rows here: to be resized the mask need not be turned at its own size.
            columns = cv2.resize(columns, (height, width), interpolation=cv2.INTER_NEAREST_EXACT)
        return np.ascontiguousarray(columns.T).view(np.bool_)


def from_list(counts: Sequence[object], height: int, width: int) -> Rle:
    """Return the mask that a list of numbers from a stranger means; raises `RleError`."""
    if not all(type(count) is int and 0 <= count <= height * width for count in counts):
        raise RleError("a run length is not a whole number from 0 to the number of pixels")
    return _checked(np.array(counts, np.int64), height, width)


def from_string(text: str, height: int, width: int) -> Rle:
    """Return the mask that a stranger's string means; raises `RleError`."""
    if len(text) > _MAX_STRING_CHARS:
        raise RleError(f"a string of {len(text)} characters")
    try:
        digits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - ord("0")
    except UnicodeEncodeError:
        raise RleError("a character that no run length has") from None
    if not len(digits):
        return _checked(digits, height, width)
    if digits.min() < 0 or digits.max() > _MORE + _DIGIT:
        raise RleError("a character that no run length has")
    ends = np.flatnonzero(digits & _MORE == 0)
    if not len(ends) or ends[-1] != len(digits) - 1:
        raise RleError("the string is cut off within a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_DIGITS:
        raise RleError("a number of more bits than any image has pixels")
    shifts = (np.arange(len(digits)) - np.repeat(starts, lengths)) * _DIGIT_BITS
    numbers = np.add.reduceat((digits & _DIGIT) << shifts, starts)
    negative = digits[ends] & _SIGN != 0
    numbers[negative] -= np.int64(1) << (lengths[negative] * _DIGIT_BITS)
    # From the fourth number on each is the difference from the run before last.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return _checked(numbers, height, width)


def _checked(counts: NDArray[np.int64], height: int, width: int) -> Rle:
    pixels = height * width
    if len(counts) and (counts.min() < 0 or counts.max() > pixels):
        raise RleError("a run length is below 0 or above the number of pixels")
    if (found := int(counts.sum())) != pixels:
        raise RleError(f"run lengths of {found} pixels in all, but {width} x {height} are {pixels}")
    return Rle(height, width, counts.astype(np.uint32))
