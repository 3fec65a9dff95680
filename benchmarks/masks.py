"""Masks of one image by SAM2, and what each format costs; random weights are as fast as others."""

from __future__ import annotations

import base64
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.figures import Figure
from rvmcv_worker.compute import masks, sam2_checkpoint
from rvmcv_worker.compute.embedding_cache import EmbeddingCache
from rvmcv_worker.compute.segmenter import Segmenter, open_segmenter
from rvmcv_worker.engine_wire import MaskFormat

BOXES = 10
HEIGHT, WIDTH = 1080, 810
ROUNDS = 3
_CACHE_BYTES = 512 * 1024 * 1024


def measure() -> list[Figure]:
    """Ask for masks in three ways, and write one in four."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sam2.pt"
        torch.manual_seed(0)
        torch.save({"model": sam2_checkpoint.build("sam2.1_hiera_tiny").state_dict()}, path)
        keeping = open_segmenter(path, device="cpu", cache=EmbeddingCache(_CACHE_BYTES))
        forgetting = open_segmenter(path, device="cpu", cache=None)
    dice = np.random.default_rng(0)
    image = dice.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    corners = np.sort(dice.uniform(0, 1, (BOXES, 2, 2)), axis=1) * (WIDTH, HEIGHT)
    boxes = corners.reshape(BOXES, 4).astype(np.float32)

    _ask(forgetting, image, boxes[:1], "warm-up")
    once, each, again = [], [], []
    for turn in range(ROUNDS):  # side by side: the machine is as busy for one as for the other
        key = f"image {turn}"
        once.append(_ask(keeping, image, boxes, key))
        again.append(_ask(keeping, image, boxes, key))
        each.append(sum(_ask(forgetting, image, box[None], key) for box in boxes))
    once_s, again_s, each_s = (statistics.median(taken) for taken in (once, again, each))
    precision = keeping.precision
    return [
        Figure(
            f"masks of {BOXES} boxes, one encoding, hiera-tiny, {precision}",
            1000 * once_s,
            "ms",
            "at most 0.2 of the peer's",
            "an encoding for each box",
            1000 * each_s,
        ),
        Figure("times faster than an encoding for each box", each_s / once_s, "x", ">= 5"),
        Figure(
            f"masks of {BOXES} boxes, second question about the image",
            1000 * again_s,
            "ms",
            "",
            "the first question",
            1000 * once_s,
        ),
        *_formats(),
    ]


def _ask(segmenter: Segmenter, image: NDArray[np.uint8], boxes: NDArray[np.float32], key: str) -> float:
    """Return the seconds until all masks are there."""
    started_s = time.perf_counter()
    for _ in segmenter.segment(image, boxes, image_key=key):
        pass
    return time.perf_counter() - started_s


def _formats() -> list[Figure]:
    """Write the mask of a bottle; the peer is the mask as a PNG with a byte for each pixel."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.ellipse(mask, (400, 560), (130, 380), 12, 0, 360, 1, -1)
    cv2.rectangle(mask, (440, 110), (510, 260), 1, -1)
    bottle = mask.astype(bool)
    plain_bytes, plain_ms = _cost(
        lambda: base64.b64encode(cv2.imencode(".png", mask * 255)[1].tobytes()).decode()
    )
    figures = []
    for form in MaskFormat:
        size_bytes, ms = _cost(functools.partial(masks.encode, bottle, form))
        name = f"a mask of {HEIGHT} x {WIDTH} as {form.value}"
        figures.append(Figure(f"{name}, in JSON", size_bytes, "bytes", "", "8-bit PNG", plain_bytes))
        figures.append(Figure(f"{name}, to write", ms, "ms", "", "8-bit PNG", plain_ms))
    return figures


def _cost(write: Callable[[], Any]) -> tuple[int, float]:
    """Return the bytes of a value in JSON, and the least milliseconds that writing it took."""
    taken_s = []
    for _ in range(20):
        started_s = time.perf_counter()
        value = write()
        taken_s.append(time.perf_counter() - started_s)
    return len(json.dumps(value)), 1000 * min(taken_s)
