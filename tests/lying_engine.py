"""An engine's process that does what its image says: crash, hang, lie, eat memory, or answer."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from rvmcv_worker import framing

RESULT: dict[str, Any] = {
    "image_size": [4, 2],
    "detections": [{"class": "bottle", "confidence": 0.5, "bbox": [0, 0, 4.0, 2]}],
    "backend": "torch-cpu",
    "precision": "fp32",
    "batch": 1,
    "device": "cpu",
    "timings": {"detect": 0.001},
}

#: What an image of these words has the engine answer.
LIES: dict[str, dict[str, Any]] = {
    "box is text": {**RESULT, "detections": [{"class": "a", "confidence": 0.5, "bbox": ["0", 0, 1, 1]}]},
    "box is outside": {**RESULT, "detections": [{"class": "a", "confidence": 0.5, "bbox": [0, 0, 5, 1]}]},
    "class is a number": {**RESULT, "detections": [{"class": 7, "confidence": 0.5, "bbox": [0, 0, 1, 1]}]},
    "confidence of 2": {**RESULT, "detections": [{"class": "a", "confidence": 2, "bbox": [0, 0, 1, 1]}]},
    "mask unasked": {
        **RESULT,
        "detections": [{"class": "a", "confidence": 0.5, "bbox": [0, 0, 1, 1], "segmentation": "AA=="}],
    },
    "more than asked": {**RESULT, "detections": RESULT["detections"] * 1000},
    "no size": {**RESULT, "image_size": [4]},
    "no list": {**RESULT, "detections": None},
    "timings without end": {**RESULT, "timings": {str(number): 1.0 for number in range(10_000)}},
}


def main() -> None:
    """Speak as `compute/engine.py` does."""
    job = json.loads((Path.cwd() / sys.argv[-1] / "job.json").read_text())
    stream = socket.socket(fileno=job["progress_fd"])
    if (Path.cwd() / "in" / "broken").exists():
        sys.exit("libtorch.so: cannot open shared object file")
    framing.write(stream.fileno(), {"ready": True, "device": "cpu", "versions": {"torch": "0"}})
    decoder = framing.Decoder(max_payload_bytes=1 << 20, max_per_s=None)
    while data := stream.recv(65536):
        for header, image in decoder.feed(data, time.monotonic()):
            exported = header["model"]["backend"]["path"] is not None
            _serve(stream, header["id"], image.decode(), header["options"]["mask_format"], exported)


def _masked(mask: object) -> bytes:
    found = {**RESULT["detections"][0], "segmentation": mask}
    return json.dumps({**RESULT, "detections": [found]}).encode()


def _serve(stream: socket.socket, request_id: int, does: str, mask_format: str, exported: bool) -> None:
    def say(header: dict[str, Any], payload: bytes = b"") -> None:
        framing.write(stream.fileno(), {"id": request_id, **header}, payload)

    say({"stage": "decode"})
    if does == "hang before":
        signal.pause()
    say({"stage": "load"})
    if does == "crash as it loads" or (does == "crash with an export" and exported):
        os.kill(os.getpid(), signal.SIGSEGV)
    say({"stage": "infer"})
    if does == "crash":
        os.write(1, b"illegal instruction, \x1b[31m probably\n")
        os.kill(os.getpid(), signal.SIGSEGV)
    elif does == "hang":
        signal.pause()
    elif does == "eat":
        held = b"x" * 200_000_000
        signal.pause()
        del held
    elif does == "fill":
        with (Path.cwd() / sys.argv[-1] / "rubbish").open("wb") as file:
            file.write(b"x" * 50_000_000)
            file.flush()
            signal.pause()
    elif does == "rubbish":
        stream.sendall(b"\xff" * 100)
    elif does == "stranger":
        say({"id": 999_999, "ok": True}, json.dumps(RESULT).encode())
    elif does == "chatter":
        for _ in range(100):
            say({"stage": "infer"})
    elif does == "fenced":
        say({"ok": False, "error": {"code": "worker_stopped", "message": "do it again"}})
    elif does == "no image":
        say({"ok": False, "error": {"code": "image_invalid", "message": "no \x1b[2J image"}})
    elif does == "odd class":
        found = {"class": "a\x1b[2Jb", "confidence": 0.5, "bbox": [0, 0, 1, 1]}
        say({"ok": True}, json.dumps({**RESULT, "detections": [found]}).encode())
    elif does == "nested":
        say({"ok": True}, b"[" * 100_000)
    elif does == "large masks":
        small = {"size": [2, 4], "counts": "08"}
        say({"ok": True}, _masked(small if mask_format == "rle" else "A" * 600_000))
    elif does == "large masks always":
        large = {"size": [2, 4], "counts": "0" * 600_000}
        say({"ok": True}, _masked(large if mask_format == "rle" else "A" * 600_000))
    elif does == "picture unasked":
        say({"ok": True, "picture_bytes": 2}, json.dumps(RESULT).encode() + b"\xff\xd8")
    else:
        say({"ok": True}, json.dumps(LIES.get(does, RESULT)).encode())


if __name__ == "__main__":
    main()
