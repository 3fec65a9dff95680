"""The list of a batch's images: JSON Lines, `{"id", "url", "sha256"?}` each, read line by line.

It may have a million lines, so no more than one is held. A line that cannot be read is a fault of that line
alone; a list of which nothing can be read is none. Lines are numbered as an editor shows them. A byte order
mark, CRLF and blank lines are fine; two lines may have one id, for results are told apart by their index.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rvmcv_worker import framing
from rvmcv_worker.errors import DatasetInvalidError
from rvmcv_worker.protocol import Sha256, explain

#: Most images of one batch.
MAX_IMAGES = 1_000_000
#: Longest line, in bytes: a presigned URL is about 1 kB long.
MAX_LINE_BYTES = 16 * 1024
#: So many lines in which no image is named, at the beginning, are no list of images.
_TRIED = 100
_FORM = 'each line must be {"id": …, "url": …}, not compressed'
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

#: What the sender calls an image; it comes back with its result.
ImageId = Annotated[str, Field(min_length=1, max_length=256)] | Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Listed(BaseModel):
    """One line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    id: ImageId
    url: Annotated[str, Field(min_length=1, max_length=4096)]
    sha256: Sha256 | None = None


@dataclass(frozen=True)
class Entry:
    """An image of the list; `listed` is None, and `fault` says why, where the line cannot be read."""

    index: int  #: from 0, blank lines not counted
    line: int  #: from 1, as an editor shows it
    listed: Listed | None = None
    fault: str | None = None
    #: The id of a line that has one, though it cannot be read otherwise.
    id: str | int | None = None


def write(images: Iterable[Any], path: Path) -> None:
    """Write a list that came as JSON to a new file, as it would have come as a manifest."""
    with path.open("xb") as file:
        for image in images:
            file.write(json.dumps(image, separators=(",", ":")).encode() + b"\n")


def survey(path: Path, what: str) -> int:
    """Return how many images are listed; raises `DatasetInvalidError` for what is no list of images."""
    count = sum(1 for _ in _lines(path))
    if count == 0:
        raise DatasetInvalidError(f"{what} names no image; {_FORM}")
    if count > MAX_IMAGES:
        raise DatasetInvalidError(f"{what} names {count} images; at most {MAX_IMAGES} are taken: cut it up")
    _, text = next(_lines(path))
    if text is not None and text.lstrip().startswith(b"["):
        raise DatasetInvalidError(f"{what} is a JSON list, not JSON Lines; {_FORM}")
    first = list(itertools.islice(read(path), _TRIED))
    if all(entry.listed is None for entry in first):
        raise DatasetInvalidError(
            f"{what} is no list of images: none of its first {len(first)} lines names one;"
            f" {first[0].fault}; {_FORM}"
        )
    return count


def read(path: Path, start: int = 0) -> Iterator[Entry]:
    """Yield the images from index `start` on."""
    for index, (line, text) in enumerate(_lines(path)):
        if index >= start:
            yield _entry(index, line, text)


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line that is not blank, with its number; None for one that is too long."""
    with path.open("rb") as file:
        if file.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
            file.seek(0)
        for number in itertools.count(1):
            text = file.readline(MAX_LINE_BYTES + 1)
            if not text:
                return
            if len(text) > MAX_LINE_BYTES and not text.endswith(b"\n"):
                _skip_line(file)
                yield number, None
            elif not text.isspace():
                yield number, text


def _skip_line(file: BinaryIO) -> None:
    while (more := file.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
        pass


def _entry(index: int, line: int, text: bytes | None) -> Entry:
    where = f"line {line}"
    if text is None:
        return Entry(index, line, fault=f"{where}: longer than {MAX_LINE_BYTES} bytes")
    try:
        value = framing.parse_object(text.strip())
    except framing.FramingError as error:
        return Entry(index, line, fault=f"{where}: {error}")
    try:
        listed = Listed.model_validate(value)
    except ValidationError as error:
        found = value.get("id")
        known = found if isinstance(found, (str, int)) and not isinstance(found, bool) else None
        shown = known[:256] if isinstance(known, str) else known
        return Entry(index, line, fault=f"{where}: {_explain(error, value)}", id=shown)
    return Entry(index, line, listed=listed, id=listed.id)


def _explain(error: ValidationError, value: dict[str, Any]) -> str:
    for key in value:
        if key not in Listed.model_fields:
            near = difflib.get_close_matches(key, Listed.model_fields, n=1)
            return f"{key[:64]!r} is not known" + (f"; did you mean {near[0]!r}?" if near else "")
    return explain(error)
