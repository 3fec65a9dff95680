"""An engine as a process of its own, started as the daemon starts it but without the wall."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rvmcv_worker import framing
from rvmcv_worker.engine_wire import Request

_TIMEOUT_S = 120.0
JOB = {
    "task": "engine",
    "max_pixels": 25_000_000,
    "batch_window_ms": 3.0,
    "max_batch": 16,
    "memory_bytes": 8 * 1024**3,
    "embedding_cache_bytes": 64 * 1024**2,
    "device": "cpu",
}


@dataclass
class Answered:
    """All that an engine said about one request."""

    header: dict[str, Any]
    result: dict[str, Any] | None
    picture: bytes
    stages: list[str] = field(default_factory=list)

    @property
    def error(self) -> dict[str, str]:
        """The error of a request that failed."""
        assert not self.header["ok"], "the request succeeded"
        found: dict[str, str] = self.header["error"]
        return found


class EngineChild:
    """One engine: requests go in, answers come out in any order; its log is `engine.log`."""

    def __init__(self, root: Path, **job: Any) -> None:
        self.root = root
        directory = root / "engine"
        directory.mkdir(parents=True)
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_TIMEOUT_S)
        (directory / "job.json").write_text(json.dumps({**JOB, **job, "progress_fd": theirs.fileno()}))
        self.log_file = root / "engine.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rvmcv_worker.compute.child", "engine"],
                cwd=root,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1])},
            )
        theirs.close()
        self._decoder = framing.Decoder(max_payload_bytes=1024**3, max_per_s=None)
        self._frames: Iterator[tuple[dict[str, Any], bytes]] = iter(())
        self._stages: dict[int, list[str]] = {}

    def ask(self, request: Request, image: bytes) -> None:
        """Send a request."""
        self._socket.sendall(framing.encode(request.to_header(), image))

    def frame(self) -> tuple[dict[str, Any], bytes]:
        """Wait for the next thing that the engine says."""
        while True:
            if found := next(self._frames, None):
                return found
            data = self._socket.recv(1024 * 1024)
            assert data, f"the engine has ended; its log ends:\n{self.log_file.read_text()[-3000:]}"
            self._frames = self._decoder.feed(data, time.monotonic())

    def ready(self) -> dict[str, Any]:
        """Wait until the engine takes requests."""
        header, _ = self.frame()
        assert header["ready"]
        return header

    def answer(self) -> Answered:
        """Wait for the next answer."""
        while True:
            header, payload = self.frame()
            if "stage" in header:
                self._stages.setdefault(header["id"], []).append(header["stage"])
                continue
            stages = self._stages.pop(header["id"], [])
            if not header["ok"]:
                return Answered(header, None, b"", stages)
            end = len(payload) - header["picture_bytes"]
            return Answered(header, json.loads(payload[:end]), payload[end:], stages)

    def infer(self, request: Request, image: bytes) -> Answered:
        """Send one request and wait for its answer."""
        self.ask(request, image)
        answered = self.answer()
        assert answered.header["id"] == request.id
        return answered

    def hang_up(self) -> None:
        """End the stream."""
        self._socket.close()

    def close(self) -> None:
        """End the engine, whatever it does."""
        self.hang_up()
        self.process.kill()
        self.process.wait()
