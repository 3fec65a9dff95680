"""What goes between daemon and child, and what the reader refuses."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rvmcv_worker import framing
from rvmcv_worker.framing import Decoder, FramingError

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    scalars | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
headers = st.dictionaries(st.text().filter(lambda key: key != "payload_bytes"), values, max_size=5)


def frame(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(headers, st.binary(max_size=50)), max_size=5), st.integers(1, 20))
def test_messages_arrive_as_sent_however_they_are_cut(
    messages: list[tuple[dict[str, Any], bytes]], step: int
) -> None:
    data = b"".join(framing.encode(header, payload) for header, payload in messages)
    decoder = Decoder(max_payload_bytes=50, max_per_s=None)
    got = []
    for start in range(0, len(data), step):
        got += decoder.feed(data[start : start + step], 0.0)
    for (header, payload), (sent_header, sent_payload) in zip(got, messages, strict=True):
        header.pop("payload_bytes", None)
        assert (header, payload) == (sent_header, sent_payload)


@given(st.binary(max_size=200))
def test_rubbish_is_refused_or_waited_for_and_never_anything_else(data: bytes) -> None:
    with contextlib.suppress(FramingError):
        list(Decoder().feed(data, 0.0))


def test_a_message_goes_through_a_pipe_whole() -> None:
    read_fd, write_fd = os.pipe()
    header = {"text": "x" * 60_000}
    payload = b"y" * 200_000  # more than a pipe holds
    writer = threading.Thread(target=framing.write, args=(write_fd, header, payload))
    writer.start()
    decoder = Decoder(max_payload_bytes=len(payload))
    got: list[tuple[dict[str, Any], bytes]] = []
    while not got:
        got += decoder.feed(os.read(read_fd, 10_000), 0.0)
    writer.join()
    os.close(read_fd)
    os.close(write_fd)
    assert got == [({**header, "payload_bytes": len(payload)}, payload)]


def test_numbers_that_are_not_finite_become_null() -> None:
    sent = framing.encode({"loss": math.nan, "list": [math.inf, (1.0, -math.inf)]})
    ((header, _),) = Decoder().feed(sent, 0.0)
    assert header == {"loss": None, "list": [None, [1.0, None]]}
    assert framing.parse_object(b'{"a": NaN, "b": 1e999, "c": -Infinity}') == {
        "a": None,
        "b": None,
        "c": None,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b"[1]", "a JSON list where an object belongs"),
        (b'{"a": ' + b"[" * 100_000, "nested deeper than 32"),
        (b'{"a": ' * 33, "nested deeper than 32"),
        (b'{"a": "\xff"}', "not JSON"),
        ('{"a": "\u225c", "b": []}'.encode("utf-16"), "not JSON"),
    ],
)
def test_text_that_is_refused(text: bytes, said: str) -> None:
    with pytest.raises(FramingError, match=said):
        framing.parse_object(text)


@pytest.mark.parametrize(
    "text", [r'{"a": "[[[\"[[[\\"}', '{"a": "' + "[" * 100 + '"}', '{"a": ' + "[" * 31 + "]" * 31 + "}"]
)
def test_brackets_in_strings_do_not_count(text: str) -> None:
    assert framing.parse_object(text.encode()) == json.loads(text)


def test_depth_is_counted_again_after_a_string() -> None:
    with pytest.raises(FramingError, match="nested"):
        framing.parse_object(rb'{"\\": ' + b"[" * 33 + b"]" * 33 + b"}")


def test_a_header_too_long_is_refused_before_it_comes() -> None:
    with pytest.raises(FramingError, match="4294967295 bytes is over"):
        list(Decoder().feed(b"\xff\xff\xff\xff", 0.0))
    with pytest.raises(FramingError, match="is over"):
        framing.encode({"text": "x" * framing.MAX_HEADER_BYTES})


@pytest.mark.parametrize("length", [1, -1, True, "3", 1.5, None])
def test_a_payload_where_none_belongs(length: Any) -> None:
    with pytest.raises(FramingError, match="a payload of"):
        list(Decoder().feed(frame(json.dumps({"payload_bytes": length}).encode()), 0.0))


def test_too_many_messages_in_a_second() -> None:
    decoder = Decoder(max_per_s=10)
    message = framing.encode({})
    assert len(list(decoder.feed(message * 10, 5.0))) == 10
    assert len(list(decoder.feed(message * 10, 6.0))) == 10
    with pytest.raises(FramingError, match="more than 10 messages"):
        list(decoder.feed(message, 6.9))


def test_what_came_while_the_reader_was_held_up_is_no_flood() -> None:
    decoder = Decoder(max_per_s=10)
    message = framing.encode({})
    list(decoder.feed(message, 0.0))
    assert len(list(decoder.feed(message * 50, 5.0))) == 50
    with pytest.raises(FramingError, match="more than 10 messages"):
        list(decoder.feed(message, 5.5))
