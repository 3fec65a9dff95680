from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker import manifest
from rvmcv_worker.errors import DatasetInvalidError

GOOD = b'{"id": "a", "url": "s3://images/a.jpg"}'


def _file(tmp_path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(end.join(lines))
    return path


def _line(**fields: Any) -> bytes:
    return json.dumps({"id": "a", "url": "s3://images/a.jpg", **fields}).encode()


def test_a_list_is_read_in_its_order_from_any_index_on(tmp_path: Path) -> None:
    path = _file(tmp_path, *(_line(id=number, sha256="0" * 64) for number in range(40)))
    assert manifest.survey(path, "the manifest") == 40
    entries = list(manifest.read(path, 37))
    assert [(entry.index, entry.line, entry.id) for entry in entries] == [(i, i + 1, i) for i in (37, 38, 39)]
    assert entries[0].listed == manifest.Listed(id=37, url="s3://images/a.jpg", sha256="0" * 64)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD + b"\r\n",
        GOOD + b"\n" + GOOD,
        GOOD + b"\n" + GOOD + b"\n\n \t\r\n",
        GOOD + b"\n\n" + GOOD + b"\n",
    ],
    ids=["BOM and CRLF", "no end of line", "blank at the end", "blank between"],
)
def test_what_editors_do_to_a_file_is_no_fault(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(content)
    assert manifest.survey(path, "the manifest") == 2
    assert all(entry.listed is not None for entry in manifest.read(path))


def test_a_line_keeps_the_number_that_an_editor_shows(tmp_path: Path) -> None:
    (first, second) = manifest.read(_file(tmp_path, GOOD, b"", b"", b"broken"))
    assert (first.index, first.line, second.index, second.line) == (0, 1, 1, 4)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"id": "x", "url":', "line 17: not JSON: Expecting value at character 19"),
        (b"[1, 2]", "line 17: a JSON list where an object belongs"),
        (b'{"url": "s3://a/b"}', "line 17: id"),
        (b'{"id": "x"}', "line 17: url: Field required"),
        (b'{"id": "x", "url": ""}', "line 17: url: String should have at least 1 character"),
        (b'{"id": "x", "url": 5}', "line 17: url: Input should be a valid string"),
        (b'{"id": true, "url": "s3://a/b"}', "line 17: id"),
        (
            b'{"id": "x", "url": "s3://a/b", "sha265": "0"}',
            "line 17: 'sha265' is not known; did you mean 'sha256'",
        ),
        (b'{"id": "x", "url": "s3://a/b", "sha256": "0"}', "line 17: sha256: String should match"),
        (b'{"id": "\xff", "url": "s3://a/b"}', "line 17: not JSON: 'utf-8' codec can't decode"),
        (b'{"a":' * 3000, "line 17: JSON nested deeper than 32"),
        (b'{"id": "x", "url": "' + b"u" * 5000 + b'"}', "line 17: url: String should have at most 4096"),
        (b'{"id": "x", "url": "' + b"u" * 60_000 + b'"}', "line 17: longer than 16384 bytes"),
    ],
)
def test_a_broken_line_17_is_a_fault_of_line_17_alone(tmp_path: Path, line: bytes, says: str) -> None:
    path = _file(tmp_path, *[GOOD] * 16, line, *[GOOD] * 3)
    assert manifest.survey(path, "the manifest") == 20
    entries = list(manifest.read(path))
    assert [entry.index for entry in entries if entry.listed is None] == [16]
    assert entries[16].fault is not None
    assert entries[16].fault.startswith(says)


def test_the_id_of_a_line_that_cannot_be_read_otherwise_is_kept(tmp_path: Path) -> None:
    (entry,) = manifest.read(_file(tmp_path, b'{"id": "bottle-17"}'))
    assert (entry.listed, entry.id) == (None, "bottle-17")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the manifest names no image"),
        (b"\n\n\r\n", "the manifest names no image"),
        (b"\xff\xd8\xff\xe0 a picture", "none of its first 1 lines names one; line 1: not JSON"),
        (b"id,url\n1,s3://a/b\n", "none of its first 2 lines names one; line 1: not JSON"),
        (
            b'[\n{"id": "a", "url": "s3://a/b"},\n{"id": "b", "url": "s3://a/b"}\n]',
            "is a JSON list, not JSON Lines",
        ),
        ('{"id": "a", "url": "s3://a/b"}\n'.encode("utf-16"), "not compressed"),
        (b"x" * 10_000_000, "line 1: longer than 16384 bytes"),
    ],
    ids=["empty", "blank", "a picture", "CSV", "a JSON list", "UTF-16", "one endless line"],
)
def test_what_is_no_list_of_images_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetInvalidError) as caught:
        manifest.survey(path, "the manifest")
    assert says in caught.value.message


def test_more_than_a_million_images_are_refused_and_memory_stays_flat(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    with path.open("wb") as file:
        for _ in range(100):
            file.write((GOOD + b"\n") * 10_000)
    tracemalloc.start()
    try:
        assert manifest.survey(path, "the manifest") == manifest.MAX_IMAGES
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    with path.open("ab") as file:
        file.write(GOOD)
    with pytest.raises(DatasetInvalidError, match="names 1000001 images; at most 1000000"):
        manifest.survey(path, "the manifest")


def test_a_list_from_the_config_is_read_as_a_manifest_is(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    manifest.write([{"id": "ä\n", "url": "s3://a/b"}, "no object", {"id": 2, "url": "s3://a/c"}], path)
    assert manifest.survey(path, "config.images") == 3
    entries = list(manifest.read(path))
    assert [entry.id for entry in entries] == ["ä\n", None, 2]
    assert entries[1].fault == "line 2: a JSON str where an object belongs"
