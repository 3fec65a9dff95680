"""`YOLO.predict` as a practitioner calls it, warm, in a process of its own; the peer of inferences.

Reads a path a line and answers with the milliseconds from the file's bytes to the boxes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

_ENVIRONMENT = {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0"}


class PlainYolo:
    """The process; a context manager."""

    def __init__(self, model: Path, directory: Path, img_size: int) -> None:
        config_dir = directory / "plain-yolo"
        config_dir.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.plain_yolo", str(model), str(img_size)],
            env={"PATH": os.environ["PATH"], "YOLO_CONFIG_DIR": str(config_dir), **_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> PlainYolo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.communicate()

    def predict_ms(self, picture: Path) -> float:
        """Have it look at a picture; returns how long that took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{picture}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def main(model_file: str, img_size: int) -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import cv2
    import numpy as np
    from ultralytics import YOLO

    model = YOLO(model_file)
    for line in sys.stdin:
        content = Path(line.rstrip("\n")).read_bytes()
        start_s = time.perf_counter()
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        model.predict(image, imgsz=img_size, device="cpu", verbose=False)
        answers.write(f"{1000 * (time.perf_counter() - start_s):.3f}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
