"""Where the labels of a data set come from: a text file an image, or one JSON for many."""

from __future__ import annotations

from typing import Protocol

from rvmcv_worker.compute.labels import Label
from rvmcv_worker.compute.layouts import Item, Layout


class Source(Protocol):
    """The labels of a data set, found but not yet judged."""

    @property
    def names(self) -> tuple[str, ...]:
        """The class names; a class id is an index into them."""

    @property
    def layout(self) -> Layout:
        """Which image belongs to which split."""

    def label(self, item: Item, size: tuple[int, int] | None, /) -> Label:
        """Judge what is labelled on an image; `size` is (height, width) upright, where it was decoded."""

    def blamed(self, item: Item, /) -> str:
        """Return the file that an image's label faults are told of."""
