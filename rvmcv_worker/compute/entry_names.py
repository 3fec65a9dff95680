"""The names of an archive's entries: which are refused, and what they become on disk."""

from __future__ import annotations

import re
import unicodedata

from rvmcv_worker.compute.printable import printable
from rvmcv_worker.errors import DatasetInvalidError

MAX_NAME_BYTES = 1024
#: What Linux file systems take for one component.
MAX_COMPONENT_BYTES = 255
MAX_DEPTH = 32

_DRIVE = re.compile(r"^[A-Za-z]:")


def refusal(name: str, why: str) -> DatasetInvalidError:
    """Return the error for one entry."""
    return DatasetInvalidError(
        f"the archive's entry '{printable(name)}' {why}; nothing of such an archive is used. "
        "Pack the data set's folder again, with plain files only"
    )


def _parts(name: str) -> tuple[str, ...]:
    """Return the components of an entry's name; raises `DatasetInvalidError` for a name that is not safe."""
    if any(unicodedata.category(char) in {"Cc", "Cs"} for char in name):
        raise refusal(name, "has a control character or is not UTF-8")
    if "\\" in name:
        raise refusal(name, "has a backslash (packed by a tool that writes Windows paths)")
    if name.startswith("/") or _DRIVE.match(name):
        raise refusal(name, "is an absolute path")
    parts = tuple(part for part in name.split("/") if part not in {"", "."})
    if ".." in parts:
        raise refusal(name, "leads out of the archive by '..'")
    encoded = [len(part.encode()) for part in parts]
    if sum(encoded) + len(parts) > MAX_NAME_BYTES or any(size > MAX_COMPONENT_BYTES for size in encoded):
        raise refusal(
            name, f"is longer than {MAX_COMPONENT_BYTES} bytes a component or {MAX_NAME_BYTES} in all"
        )
    if len(parts) > MAX_DEPTH:
        raise refusal(name, f"lies deeper than {MAX_DEPTH} folders")
    return parts


def _fold(path: str) -> str:
    """Return what a file system that ignores case, or normalises letters, would compare."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


class EntryNames:
    """The names met so far, so that no two of them can be the same file on any file system."""

    def __init__(self) -> None:
        #: Folded path -> (path as written, whether it is a folder).
        self._seen: dict[str, tuple[str, bool]] = {}

    def add(self, name: str, *, is_dir: bool) -> str:
        """Return the relative path for an entry; raises `DatasetInvalidError` when the name is refused.

        The path is "" for the archive's own top (``./``).
        """
        parts = _parts(name)
        if not parts:
            if not is_dir:
                raise refusal(name, "is a file without a name")
            return ""
        for end in range(1, len(parts)):
            self._add_one("/".join(parts[:end]), name, is_dir=True)
        path = "/".join(parts)
        self._add_one(path, name, is_dir=is_dir)
        return path

    def _add_one(self, path: str, name: str, *, is_dir: bool) -> None:
        folded = _fold(path)
        known = self._seen.get(folded)
        if known is None:
            self._seen[folded] = (path, is_dir)
            return
        other, other_is_dir = known
        if other != path:
            raise refusal(
                name, f"differs from '{printable(other)}' only in case or in how its letters are written"
            )
        if other_is_dir != is_dir:
            raise refusal(name, "is a file and a folder at once")
        if not is_dir:
            raise refusal(name, "is there twice")
