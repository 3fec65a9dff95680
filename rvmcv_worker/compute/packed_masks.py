"""Masks kept packed: one of 12 megapixels takes some 10 kB."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class PackedMasks:
    """Masks of one image, each unpacked anew whenever it is asked for."""

    def __init__(self, size: tuple[int, int]) -> None:
        #: Height and width in pixels.
        self._size = size
        self._packed: list[bytes] = []

    def add(self, mask: NDArray[np.bool_]) -> None:
        """Keep a (height, width) mask."""
        self._packed.append(zlib.compress(np.packbits(mask).tobytes(), 1))

    def __len__(self) -> int:
        return len(self._packed)

    def __iter__(self) -> Iterator[NDArray[np.bool_]]:
        height, width = self._size
        for packed in self._packed:
            bits = np.frombuffer(zlib.decompress(packed), np.uint8)
            yield np.unpackbits(bits, count=height * width).reshape(self._size).view(np.bool_)
