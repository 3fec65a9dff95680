"""One entry of an archive, whatever the archive's kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

#: How much is unpacked at a time.
CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder: nothing else leaves a reader."""

    #: As written in the archive, unchecked.
    name: str
    is_dir: bool
    #: What its header claims.
    size_bytes: int
    #: Yields the content; of a tar's entry only until the next entry is asked for.
    chunks: Callable[[], Iterator[bytes]]
