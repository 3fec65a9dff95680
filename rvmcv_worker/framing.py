"""Messages between the daemon and a child: a 4-byte length, a JSON header, raw bytes.

No pickle in either direction. What a child sends is untrusted: the reader bounds length, depth and
rate before anything else looks at it, and raises `FramingError` on the first thing out of bounds.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from typing import Any

#: Largest JSON header, in bytes.
MAX_HEADER_BYTES = 64 * 1024
#: Deepest nesting of lists and objects in a header or a result file.
MAX_DEPTH = 32
#: Largest `result.json`, in bytes.
MAX_RESULT_BYTES = 16 * 1024 * 1024
#: Most messages a child may send in any one second.
MAX_MESSAGES_PER_S = 100
#: Longest pause of the reader for which it makes allowance, in seconds.
_MAX_PAUSE_S = 60

_LENGTH = struct.Struct(">I")


class FramingError(Exception):
    """A message that breaks the framing's bounds."""


def finite(value: Any) -> Any:
    """Return a copy of JSON data in which each number that is not finite is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


#: All bytes but the brackets.
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _check_depth(text: bytes, max_depth: int) -> None:
    """Refuse nesting beyond `max_depth` before the JSON parser recurses into it."""
    # With escapes gone, each quote opens or closes a string, and every second piece is outside of them.
    outside = text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    depth = 0
    for byte in b"".join(outside).translate(None, _NO_BRACKETS):
        if byte in b"[{":
            depth += 1
            if depth > max_depth:
                raise FramingError(f"JSON nested deeper than {max_depth}")
        else:
            depth -= 1


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse untrusted JSON that must be one object; numbers that are not finite become None.

    Raises `FramingError` for anything else.
    """
    _check_depth(text, MAX_DEPTH)
    try:
        # Decoded here: given bytes, the parser guesses UTF-16 and 32 too, in which the check above is blind.
        value = json.loads(text.decode("utf-8"), parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        # Without the parser's line number: this may itself be a line of a file.
        raise FramingError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise FramingError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FramingError(f"a JSON {type(value).__name__} where an object belongs")
    result: dict[str, Any] = finite(value)  # 1e999 parses to infinity
    return result


def encode(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """Return one message; the header's ``payload_bytes`` tells the reader how much follows it."""
    if payload:
        header = {**header, "payload_bytes": len(payload)}
    text = json.dumps(finite(header), allow_nan=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise FramingError(f"a header of {len(text)} bytes is over {MAX_HEADER_BYTES}")
    return _LENGTH.pack(len(text)) + text + payload


def write(fd: int, header: dict[str, Any], payload: bytes = b"") -> None:
    """Write one message to a blocking descriptor, whole."""
    view = memoryview(encode(header, payload))
    while view:
        view = view[os.write(fd, view) :]


class Decoder:
    """Turns bytes, as they arrive, into messages.

    `max_payload_bytes` is 0 for progress pipes, on which raw bytes have no business.
    """

    def __init__(self, *, max_payload_bytes: int = 0, max_per_s: int | None = MAX_MESSAGES_PER_S) -> None:
        self._buffer = bytearray()
        self._header: dict[str, Any] | None = None
        self._wanted = 0
        self._max_payload_bytes = max_payload_bytes
        self._max_per_s = max_per_s
        self._window_start_s = -math.inf
        self._left_in_window = 0.0

    def feed(self, data: bytes, now_s: float) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yield each message that `data` completes as (header, payload); `now_s` is monotonic."""
        self._buffer += data
        while True:
            if self._header is None:
                if len(self._buffer) < _LENGTH.size:
                    return
                (length,) = _LENGTH.unpack_from(self._buffer)
                if length > MAX_HEADER_BYTES:
                    raise FramingError(f"a header of {length} bytes is over {MAX_HEADER_BYTES}")
                if len(self._buffer) < _LENGTH.size + length:
                    return
                text = bytes(self._buffer[_LENGTH.size : _LENGTH.size + length])
                del self._buffer[: _LENGTH.size + length]
                self._header = parse_object(text)
                self._wanted = self._payload_length(self._header)
            if len(self._buffer) < self._wanted:
                return
            header, payload = self._header, bytes(self._buffer[: self._wanted])
            del self._buffer[: self._wanted]
            self._header = None
            self._count(now_s)
            yield header, payload

    def _payload_length(self, header: dict[str, Any]) -> int:
        length = header.get("payload_bytes", 0)
        if (
            not isinstance(length, int)
            or isinstance(length, bool)
            or not 0 <= length <= self._max_payload_bytes
        ):
            raise FramingError(f"a payload of {length!r} bytes is not within 0 and {self._max_payload_bytes}")
        return length

    def _count(self, now_s: float) -> None:
        if self._max_per_s is None:
            return
        if (since_s := now_s - self._window_start_s) >= 1:
            # A reader that was held up finds what came meanwhile all at once: that is no flood.
            self._left_in_window = self._max_per_s * min(since_s, _MAX_PAUSE_S)
            if self._window_start_s == -math.inf:
                self._left_in_window = self._max_per_s
            self._window_start_s = now_s
        self._left_in_window -= 1
        if self._left_in_window < 0:
            raise FramingError(f"more than {self._max_per_s} messages in a second")
