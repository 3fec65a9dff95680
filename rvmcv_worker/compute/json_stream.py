"""A stranger's JSON, of any length, one entry at a time.

`json.load` makes a tree of some five times the file's size; here only one entry of a list is in memory,
which the reader turns into something small. It also takes NaN and Infinity, which are no JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from rvmcv_worker.compute.printable import printable
from rvmcv_worker.errors import DatasetInvalidError

_CHUNK_CHARS = 1024 * 1024
#: Of one entry: an object with an outline of two million numbers.
MAX_ENTRY_CHARS = 16 * 1024 * 1024
_TOO_LONG = f"an entry of more than {MAX_ENTRY_CHARS} characters"
_BLANKS = re.compile(r"[ \t\n\r]*")
_NOTHING, _MORE_OF_A_NUMBER = re.compile(r"\Z"), re.compile(r"[0-9.eE+-]*\Z")
#: How close to the end of what was read an error may be that more text can mend: within a number or a word.
_CUT_OFF_CHARS = 64


class JsonStream:
    """A JSON object in a file, read from front to end; what is no JSON raises `DatasetInvalidError`."""

    def __init__(self, path: Path, name: str, tick: Callable[[], None]) -> None:
        self._name = printable(name)
        self._tick = tick
        self._file = path.open(encoding="utf-8-sig")
        self._decoder = json.JSONDecoder(parse_constant=self._refuse_constant)
        self._text = ""
        self._at = 0
        self._dropped_chars = 0
        self._ended = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def names(self) -> Iterator[str]:
        """Yield the names in the object that the file is; each one's value must be read before the next.

        Nothing is yielded for a file that holds something else.
        """
        if self._peek() != "{":
            return
        self._at += 1
        for _ in self._members("}"):
            key = self.value()
            if not isinstance(key, str):
                self._refuse("a key is no text")
            if self._peek() != ":":
                self._refuse("':' is missing")
            self._at += 1
            yield key
        if self._peek():
            self._refuse("something follows the object")

    def entries(self) -> Iterator[object]:
        """Yield the entries of the list that is the next value; of any other value nothing."""
        if self._peek() != "[":
            self.value()
            return
        self._at += 1
        for _ in self._members("]"):
            yield self.value()

    def value(self) -> object:
        """Return the next value, whole."""
        self._peek()
        while True:
            wrong: json.JSONDecodeError | None = None
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                wrong = error
            except RecursionError:
                self._refuse("lists or objects are nested too deep")
            except ValueError:
                self._refuse("a number of thousands of digits")
            else:
                # Of a number more may follow: what is read of 0.5 can be 0, or 0 and the point.
                more = _MORE_OF_A_NUMBER if isinstance(found, (int, float)) else _NOTHING
                is_cut = bool(more.match(self._text, end))
                if self._ended or not is_cut:
                    if end - self._at > MAX_ENTRY_CHARS:
                        self._refuse(_TOO_LONG)
                    self._at = end
                    return found
            mendable = not self._ended and (
                wrong is None
                or wrong.msg.startswith("Unterminated string")
                or wrong.pos >= len(self._text) - _CUT_OFF_CHARS
            )
            if wrong and not mendable:
                self._at = wrong.pos
                self._refuse(wrong.msg)
            if len(self._text) - self._at > MAX_ENTRY_CHARS:
                self._refuse(_TOO_LONG)
            self._read()

    def _members(self, closing: str) -> Iterator[None]:
        """Yield before each member of the list or object that has just begun."""
        if self._peek() == closing:
            self._at += 1
            return
        while True:
            yield
            found = self._peek()
            if found == closing:
                self._at += 1
                return
            if found != ",":
                self._refuse(f"',' or '{closing}' is missing" if found else "the file is cut off")
            self._at += 1

    def _peek(self) -> str:
        """Return the next character that is not blank, "" at the end."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            assert blanks is not None
            self._at = blanks.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read()

    def _read(self) -> None:
        """Read on, twice as much as is waiting, so that a long entry is not decoded again for each chunk."""
        self._tick()
        waiting = self._text[self._at :]
        try:
            more = self._file.read(max(_CHUNK_CHARS, len(waiting)))
        except UnicodeDecodeError:
            self._at = len(self._text)
            self._refuse("it is not UTF-8 text after this")
        self._dropped_chars += self._at
        self._text, self._at = waiting + more, 0
        self._ended = not more

    def _refuse_constant(self, word: str) -> NoReturn:
        self._refuse(f"{word} is no number of JSON's")

    def _refuse(self, why: str) -> NoReturn:
        place = self._dropped_chars + self._at + 1
        raise DatasetInvalidError(
            f"{self._name} cannot be read as JSON: {why} (near character {place}); export it again"
        )
