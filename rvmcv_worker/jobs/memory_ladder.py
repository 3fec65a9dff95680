"""What a training tries next when the GPU's memory did not hold it: half the batch, then smaller images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

#: Image sizes are multiples of this, in pixels.
_STRIDE_PX = 32


@dataclass(frozen=True)
class Rung:
    """A batch and an image size (pixels) to try."""

    batch: int
    imgsz: int

    def reached(self, detail: Mapping[str, Any] | None) -> Rung:
        """Return what a child had come down to by itself, by its own word: never more than it was given."""
        found = detail or {}
        return Rung(_at_most(self.batch, found.get("batch")), _at_most(self.imgsz, found.get("imgsz")))

    def below(self, smallest_imgsz: int, *, smallest_batch: int = 1) -> Rung | None:
        """Return the next rung, None below the last: half the batch, or three quarters of the size."""
        if self.batch > smallest_batch:
            return replace(self, batch=max(smallest_batch, self.batch // 2))
        smaller = self.imgsz * 3 // 4 // _STRIDE_PX * _STRIDE_PX
        return replace(self, imgsz=smaller) if smaller >= smallest_imgsz else None


def smallest_imgsz(imgsz: int, *, may_shrink: bool) -> int:
    """Return the smallest size, in pixels, that a job which asked for `imgsz` is trained at: half of it."""
    return max(_STRIDE_PX, imgsz // 2) if may_shrink else imgsz


def _at_most(limit: int, said: Any) -> int:
    return min(limit, said) if type(said) is int and said >= 1 else limit
