"""JSON of any length, an entry at a time, wherever the chunks that are read may end."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rvmcv_worker.compute import json_stream
from rvmcv_worker.compute.json_stream import JsonStream
from rvmcv_worker.errors import DatasetInvalidError


def read(path: Path) -> dict[str, Any]:
    with closing(JsonStream(path, "a.json", lambda: None)) as stream:
        return {name: list(stream.entries()) if name == "list" else stream.value() for name in stream.names()}


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@pytest.fixture(params=[1, 2, 7, 1000])
def chunk_chars(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_stream, "_CHUNK_CHARS", request.param)
    return int(request.param)


@given(st.lists(VALUES, max_size=4), VALUES, st.sampled_from([None, 1, "\t"]), st.booleans())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_reads_what_json_reads(
    tmp_path: Path, chunk_chars: int, entries: list[Any], other: Any, indent: Any, ascii_only: bool
) -> None:
    content = {"other": other, "list": entries, "last": [other]}
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    file = tmp_path / "a.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read(file) == content


@given(st.integers(0, 200), st.sampled_from([*'{}[],:"0-\\x \n', ""]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_refuses_what_json_refuses(tmp_path: Path, chunk_chars: int, place: int, char: str) -> None:
    content = {"list": [{"id": 1, "x": [1.5, -2e3, True], "name": "a\\u00e9"}, [], None], "other": {"a": {}}}
    text = json.dumps(content)
    place = 1 + place % (len(text) - 1)  # another begin is another kind of file
    text = text[:place] + char + text[place + 1 :]
    file = tmp_path / "a.json"
    file.write_text(text)
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(DatasetInvalidError, match=r"a\.json cannot be read as JSON"):
            read(file)
    else:
        assert read(file) == expected


def test_an_entry_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_ENTRY_CHARS", 10_000)
    for length in (9_000, 11_000, 3_000_000):
        (tmp_path / "a.json").write_text(json.dumps({"list": ["x", "y" * length]}))
        if length < 10_000:
            assert len(read(tmp_path / "a.json")["list"]) == 2
        else:
            with pytest.raises(DatasetInvalidError, match="an entry of more than"):
                read(tmp_path / "a.json")


def test_a_long_list_is_not_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    monkeypatch.setattr(json_stream, "_CHUNK_CHARS", 10_000)
    file.write_text('{"list": [' + ",".join(['{"id": 1, "segmentation": [[1.25, 2, 3]]}'] * 60_000) + "]}")
    tracemalloc.start()
    with closing(JsonStream(file, "a.json", lambda: None)) as stream:
        for _ in stream.names():
            assert sum(1 for _ in stream.entries()) == 60_000
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < file.stat().st_size / 10
