"""Lists of a batch's images, JSON Lines, and how one is cut: line by line, without looking into the lines.

A line that cannot be read is an error of that line in the worker's results, never the end of the batch. A
blank line is no image, but it stays, so that lines keep their numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rvmcv_worker.reference.refused import FieldRefusedError
from rvmcv_worker.reference.settings import Settings

#: No line names an image that is so long: this is another kind of file.
_LINE_LIMIT_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """A shard's list, in a file."""

    file: Path
    images: int
    #: Where its first image stands in the whole list, from 0.
    first_index: int
    #: The number of its first line in the whole list, from 1.
    first_line: int


@dataclass(frozen=True)
class Cut:
    """A whole list, read to its end."""

    pieces: list[Piece]
    images: int
    sha256: str


def cut(field: str, chunks: Iterable[bytes], folder: Path, settings: Settings) -> Cut:
    """Write the list's pieces into a folder; raises `FieldRefusedError` that names the field."""
    digest = hashlib.sha256()
    pieces: list[Piece] = []
    images = first_line = 0
    piece: list[bytes] = []
    in_piece = 0

    def end_piece() -> None:
        file = folder / f"{len(pieces)}.jsonl"
        file.write_bytes(b"".join(piece))
        pieces.append(Piece(file, in_piece, images - in_piece, first_line + 1))

    lines = _lines(field, _limited(field, chunks, settings.manifest_limit_bytes))
    for number, line in enumerate(lines):
        digest.update(line)
        blank = not line.removeprefix(_BYTE_ORDER_MARK if number == 0 else b"").strip()
        if not blank and in_piece == settings.shard_size:
            end_piece()
            piece, in_piece, first_line = [], 0, number
        piece.append(line)
        if not blank:
            in_piece += 1
            images += 1
        if images > settings.batch_limit_images:
            limit = settings.batch_limit_images
            raise FieldRefusedError(field, f"lists more than {limit} images: cut it into several batches")
    if not images:
        raise FieldRefusedError(field, 'names no image; each line must be {"id": …, "url": …}')
    end_piece()
    return Cut(pieces, images, digest.hexdigest())


def _limited(field: str, chunks: Iterable[bytes], limit_bytes: int) -> Iterator[bytes]:
    seen_bytes = 0
    for chunk in chunks:
        seen_bytes += len(chunk)
        if seen_bytes > limit_bytes:
            raise FieldRefusedError(field, f"is larger than {limit_bytes} bytes: cut it into several batches")
        yield chunk


def _lines(field: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in whole)
        if len(rest) > _LINE_LIMIT_BYTES:
            message = f"has a line of more than {_LINE_LIMIT_BYTES} bytes: it is no list of images"
            raise FieldRefusedError(field, message)
    if rest:
        yield rest
