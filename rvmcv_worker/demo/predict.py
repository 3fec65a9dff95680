"""What a trained model sees in pictures, found in a process of its own: the caller stays without torch.

    python -m rvmcv_worker.demo.predict MODEL IMAGE … [--label-task …] [--img-size …] [--confidence …]

prints one JSON line an image, in their order:
``{"image": path, "detections": [{"class": name, "confidence": c, "bbox": [left, top, right, bottom]}]}``,
in pixels of the picture; or ``{"image": path, "error": why}``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rvmcv_worker.demo.sheet import Detection


class PredictError(Exception):
    """The model could not be run on the pictures."""


def predict(
    model: Path,
    images: Sequence[Path],
    *,
    label_task: str = "detect",
    img_size: int = 640,
    confidence: float = 0.25,
    timeout_s: float = 300.0,
) -> list[tuple[Detection, ...]]:
    """Return what `model` finds, per image. Raises `PredictError` with what the process said last."""
    options = ("--label-task", label_task, "--img-size", str(img_size), "--confidence", str(confidence))
    python = (sys.executable, "-m", "rvmcv_worker.demo.predict")
    command = (*python, *options, "--", str(model), *map(str, images))
    what = f"{model.name} on {len(images)} pictures"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise PredictError(f"{what} was not done in {timeout_s:.0f} s") from error
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise PredictError(f"{what} ended with status {done.returncode}: {last}")
    return [detections_of(json.loads(line)) for line in done.stdout.splitlines()]


def detections_of(line: dict[str, Any]) -> tuple[Detection, ...]:
    """One line of the output, as objects."""
    if "error" in line:
        raise PredictError(f"{line['image']}: {line['error']}")
    found = [(d["class"], d["confidence"], d["bbox"]) for d in line["detections"]]
    return tuple(Detection(name, confidence, (b[0], b[1], b[2], b[3])) for name, confidence, b in found)


def run_model(arguments: argparse.Namespace, output_fd: int) -> None:
    """Run the model image by image, writing a line after each."""
    import cv2

    from rvmcv_worker.compute.checkpoint import open_yolo11

    model = open_yolo11(arguments.model, arguments.label_task)
    options: dict[str, Any] = {"imgsz": arguments.img_size, "conf": arguments.confidence}
    options |= {"device": "cpu", "verbose": False}
    # A sheet for people: each thing is drawn once, under the class that is likelier.
    options |= {"iou": 0.5, "agnostic_nms": True}
    for path in arguments.images:
        line: dict[str, Any] = {"image": str(path)}
        pixels = cv2.imread(str(path))  # BGR, turned as its EXIF says
        if pixels is None:
            line["error"] = "not a picture that can be decoded"
        else:
            result = model.predict(pixels, **options)[0]
            boxes = result.boxes.numpy()
            line["detections"] = [
                {
                    "class": result.names[int(class_id)],
                    "confidence": round(float(confidence), 4),
                    "bbox": [round(float(edge), 2) for edge in corners],
                }
                for class_id, confidence, corners in zip(boxes.cls, boxes.conf, boxes.xyxy, strict=True)
            ]
        os.write(output_fd, (json.dumps(line) + "\n").encode())


def main() -> None:
    """Isolate Ultralytics, keep its chatter off standard output, run."""
    parser = argparse.ArgumentParser(prog="python -m rvmcv_worker.demo.predict")
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--label-task", choices=("detect", "segment"), default="detect")
    parser.add_argument("--img-size", type=int, default=640)
    parser.add_argument("--confidence", type=float, default=0.25)
    arguments = parser.parse_args()
    output_fd = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with tempfile.TemporaryDirectory(prefix="rvmcv-predict-") as directory:
        from rvmcv_worker.compute.ultralytics_env import isolate, require_safe_load

        isolate(Path(directory))
        require_safe_load()
        run_model(arguments, output_fd)


if __name__ == "__main__":
    main()
