"""The images of an archive, found by the names that a COCO file has for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from rvmcv_worker.compute.layouts import Parts, by_folder, folded, parts_of, plain_parts

#: Of how many last components of a path there is an index.
_INDEXED = 3
#: Images that end alike of which the right one is looked for.
_MAX_ALIKE = 1000


class ArchiveImages:
    """An index of paths by how they end."""

    def __init__(self, images: Iterable[str]) -> None:
        self._by_end: dict[Parts, list[tuple[Parts, str]]] = defaultdict(list)
        for image in images:
            parts = folded(parts_of(image))
            for count in range(1, min(_INDEXED, len(parts)) + 1):
                self._by_end[parts[-count:]].append((parts, image))

    def find(self, file_name: str, named_in: str, split: str) -> tuple[str, bool] | None:
        """Return the image that `file_name` means in the file `named_in`, and whether all of its path fits.

        None when there is none, or several that fit alike. The path may be of somebody's disk: the longest
        end counts, then how near the image lies to the file. An image in another split's folder is no match.
        """
        wanted = plain_parts(file_name)
        ends = (wanted[-count:] for count in range(min(_INDEXED, len(wanted)), 0, -1))
        alike = next((self._by_end[end] for end in ends if end in self._by_end), [])
        here = folded(parts_of(named_in)[:-1])
        best: tuple[int, int] = (0, 0)
        found: list[str] = []
        for parts, image in alike if len(alike) <= _MAX_ALIKE else ():
            own_split, _ = by_folder(parts)
            if split and own_split and own_split != split:
                continue
            fit = (_shared(reversed(parts), reversed(wanted)), _shared(parts[:-1], here))
            if fit > best:
                best, found = fit, []
            if fit == best:
                found.append(image)
        return (found[0], best[0] == len(wanted)) if len(found) == 1 else None


def _shared(one: Iterable[str], other: Iterable[str]) -> int:
    """Return how many components two paths have in common, from where they are read."""
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
