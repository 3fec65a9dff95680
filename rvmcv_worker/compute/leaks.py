"""The same picture in two splits, or nearly the same: what makes a measured model look better than it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Bits of 64 by which two dHashes may differ.
MAX_DISTANCE = 4
#: Rows of the distance table computed at once: 256 x 50,000 x 8 bytes are 100 MB.
_CHUNK = 256
#: More near pairs than this mean frames of a film, in which grouping groups everything.
_MAX_PAIRS = 1_000_000


@dataclass(frozen=True, slots=True)
class Leak:
    """An image of a later split that an earlier one has too; both by index."""

    earlier: int
    later: int
    #: Bits by which the dHashes differ; None when the files are equal.
    distance: int | None


def _distances(rows: NDArray[np.uint64], columns: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Return the Hamming distances, shape (len(rows), len(columns))."""
    distances: NDArray[np.uint8] = np.bitwise_count(rows[:, None] ^ columns[None, :])
    return distances


def _known(hashes: list[int | None]) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
    """Return the indices of the images that have a hash, and the hashes."""
    indices = [index for index, value in enumerate(hashes) if value is not None]
    return np.array(indices, np.intp), np.array([hashes[index] for index in indices], np.uint64)


def find_leaks(
    earlier: Sequence[tuple[bytes, int | None]],
    later: Sequence[tuple[bytes, int | None]],
    tick: Callable[[], None],
) -> list[Leak]:
    """Return at most one leak, the nearest, for each image of `later`; images are (sha256, dHash)."""
    by_sha = {sha: index for index, (sha, _) in reversed(list(enumerate(earlier)))}
    found = {index: Leak(by_sha[sha], index, None) for index, (sha, _) in enumerate(later) if sha in by_sha}
    rows, row_hashes = _known([None if index in found else dhash for index, (_, dhash) in enumerate(later)])
    columns, column_hashes = _known([dhash for _, dhash in earlier])
    if columns.size:
        for start in range(0, len(rows), _CHUNK):
            tick()
            distances = _distances(row_hashes[start : start + _CHUNK], column_hashes)
            nearest = distances.argmin(axis=1)
            for offset, column in enumerate(nearest.tolist()):
                distance = int(distances[offset, column])
                if distance <= MAX_DISTANCE:
                    index = int(rows[start + offset])
                    found[index] = Leak(int(columns[column]), index, distance)
    return [found[index] for index in sorted(found)]


def near_groups(images: Sequence[tuple[bytes, int | None]], tick: Callable[[], None]) -> list[int]:
    """Return a group for each image, such that equal and near-equal images share one.

    Where nearly everything looks alike only equal files share a group.
    """
    first_by_sha: dict[bytes, int] = {}
    groups = [first_by_sha.setdefault(sha, index) for index, (sha, _) in enumerate(images)]
    pairs = []
    for pair in _near_pairs([dhash for _, dhash in images], tick):
        pairs.append(pair)
        if len(pairs) > _MAX_PAIRS:
            return groups
    merged = list(groups)

    def root(index: int) -> int:
        while merged[index] != index:
            merged[index] = merged[merged[index]]
            index = merged[index]
        return index

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        merged[high] = low
    result = [root(index) for index in range(len(images))]
    largest = max(Counter(result).values(), default=0)
    return groups if largest > len(images) // 2 else result


def _near_pairs(hashes: list[int | None], tick: Callable[[], None]) -> Iterator[tuple[int, int]]:
    indices, values = _known(hashes)
    for start in range(0, len(indices), _CHUNK):
        tick()
        distances = _distances(values[start : start + _CHUNK], values[: start + _CHUNK])
        for row, column in zip(*np.nonzero(distances <= MAX_DISTANCE), strict=True):
            if column < start + row:
                yield int(indices[column]), int(indices[start + row])
