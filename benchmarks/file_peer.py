"""A server that costs little: gives one file, keeps what it gets and hashes it with MD5, as S3 does.

It stands in for MinIO before `curl` and the worker alike; behind `moto`'s server both would be equally
slow. It speaks as much of S3 and of RVM-Server as an upload needs. `serving` runs it as a process of its own,
which prints its port.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_PIECE_BYTES = 1024 * 1024
_OBJECT = "<Bucket>models</Bucket><Key>k</Key>"
_BEGUN = f"<InitiateMultipartUploadResult>{_OBJECT}<UploadId>u</UploadId></InitiateMultipartUploadResult>"
_DONE = f"<CompleteMultipartUploadResult>{_OBJECT}<ETag>e</ETag></CompleteMultipartUploadResult>"


class _Peer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    file: Path

    def do_GET(self) -> None:
        with self.file.open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Length", str(self.file.stat().st_size))
            self.end_headers()
            self.connection.sendfile(file)

    def do_PUT(self) -> None:
        left, piece = int(self.headers["Content-Length"]), memoryview(bytearray(_PIECE_BYTES))
        digest = hashlib.md5(usedforsecurity=False)
        with tempfile.TemporaryFile(dir=self.file.parent) as kept:
            while left and (got := self.rfile.readinto(piece[: min(left, _PIECE_BYTES)])):
                kept.write(piece[:got])
                digest.update(piece[:got])
                left -= got
        self._answer(b"", digest.hexdigest())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/job-uploads"):
            slot = {"url": f"http://{self.headers['Host']}/slot", "path": "s3://models/slot"}
            names = [file["name"] for file in json.loads(body)["files"]]
            self._answer(json.dumps({"uploads": dict.fromkeys(names, slot)}).encode())
        else:
            self._answer((_BEGUN if "uploads" in self.path else _DONE).encode())

    def _answer(self, body: bytes, etag: str = "e") -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(file: Path) -> Iterator[str]:
    """Serve `file` from a process of its own, at the URL that is yielded."""
    command = [sys.executable, "-m", "benchmarks.file_peer", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


if __name__ == "__main__":
    _Peer.file = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Peer)
    print(server.server_port, flush=True)
    server.serve_forever()
