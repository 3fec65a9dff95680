"""The streamed form: as a server's parser reads it, and never in memory whole."""

from __future__ import annotations

import email.message
import email.parser
import io
from pathlib import Path

from rvmcv_worker.multipart import MultipartBody


class Watched(io.BytesIO):
    """A file whose bytes are on disk, which refuses to be read whole."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.read_bytes())
        self._file = path.open("rb")

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert 0 < size <= 1 << 20, "the file would be read whole"
        return super().read(size)

    def close(self) -> None:
        self._file.close()
        super().close()


def parts_of(body: MultipartBody) -> list[email.message.Message]:
    sent = b"".join(body)
    assert len(sent) == len(body)
    head = f"Content-Type: {body.content_type}\r\n\r\n".encode()
    whole, *parts = email.parser.BytesParser().parsebytes(head + sent).walk()
    assert whole.is_multipart()
    return parts


def test_form_has_the_length_it_says_and_the_parts_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    content = b"--boundary\r\n\0" * 100_000
    path.write_bytes(content)
    with Watched(path) as file:
        fields = {"version": 'v"1\r\nX: y', "name": "ü"}
        version, name, model = parts_of(MultipartBody(fields, "model_file", 'be"st\r\n.pt', file))
    assert version.get_payload(decode=True) == b'v"1\r\nX: y'
    assert name.get_payload(decode=True) == "ü".encode()
    assert model.get_payload(decode=True) == content
    assert model.get_param("name", header="content-disposition") == "model_file"
    assert list(model.keys()) == ["Content-Disposition", "Content-Type"]


def test_file_is_sent_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(b"model")
    with path.open("rb") as file:
        file.read()
        (model,) = parts_of(MultipartBody({}, "model_file", "best.pt", file))
    assert model.get_payload(decode=True) == b"model"
