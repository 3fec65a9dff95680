"""The stage of the inference benchmark: a warm engine with a detector, and pictures in storage."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import file_peer
from benchmarks.stage import stage
from rvmcv_worker.demo.drawing import encode
from rvmcv_worker.demo.scene import draw_scene
from rvmcv_worker.reference.server import ReferenceServer
from tests import tiny_model

IMG_SIZE = 640
TIMEOUT_S = 300.0
_SHARED = Path(os.environ.get("RVMCV_SHARED", Path(__file__).parents[2] / "shared"))
_VERSION = "benchmark-v1"


@dataclass(frozen=True)
class Ended:
    """A job that completed."""

    job: dict[str, Any]
    #: From the moment before it was queued to the moment when its end was known.
    took_ms: float

    @property
    def result(self) -> dict[str, Any]:
        """What it came to."""
        found: dict[str, Any] = self.job["result"]
        return found


@dataclass(frozen=True)
class Inferring:
    """A server, a worker, a detector that is active, and pictures."""

    server: ReferenceServer
    files: tuple[Path, ...]
    #: Of the same pictures, in the reference server's embedded store.
    urls: tuple[str, ...]
    #: The first picture, given out by a server that costs next to nothing.
    cheap_url: str
    #: What each job's config says of its model.
    model: dict[str, Any]

    def queue(self, url: str, **options: Any) -> str:
        """Queue one inference."""
        return self.server.queue_inference({**self.model, "image_url": url, **options})

    def infer(self, url: str, **options: Any) -> Ended:
        """Queue one inference and wait for its end."""
        start_s = time.monotonic()
        (ended,) = self.wait([self.queue(url, **options)], start_s)
        return ended

    def queue_batch(self, urls: Sequence[str]) -> str:
        """Queue a batch, not cut into shards."""
        images = [{"id": str(i), "url": url} for i, url in enumerate(urls)]
        return self.server.queue_batch({**self.model, "images": images})

    def wait(self, job_ids: Sequence[str], start_s: float) -> list[Ended]:
        """Wait for jobs that were queued at `start_s`. Raises RuntimeError unless all completed."""
        ended = []
        for job_id in job_ids:
            job = self.server.wait_until_final(job_id, TIMEOUT_S)
            if job["status"] != "completed":
                raise RuntimeError(f"{job_id} ended {job['status']}: {job['error']}")
            ended.append(Ended(job, 1000 * (time.monotonic() - start_s)))
        return ended


@contextlib.contextmanager
def inferring(model: Path, files: Sequence[Path], backend: str) -> Iterator[Inferring]:
    """Start all of it with one `[inference] backend`, and return when its engine is warm."""
    with file_peer.serving(files[0]) as cheap_url:
        host = cheap_url.removeprefix("http://")
        extra: dict[str, dict[str, object]] = {
            "inference": {"backend": backend},
            "storage": {"allowed_hosts": [host], "plain_http_hosts": [host]},
        }
        with stage(job_types=("inference", "batch-inference"), extra=extra) as (server, _worker):
            server.add_model(model, model_name="yolo11", version=_VERSION, active=True)
            (row,) = server.models()
            urls = tuple(server.put_object("datasets", f"{i}.jpg", file) for i, file in enumerate(files))
            named = {"model_version": _VERSION, "model_sha256": row["sha256_hash"], "model_active": True}
            asked = Inferring(
                server, tuple(files), urls, f"{cheap_url}/0.jpg", {**named, "img_size": IMG_SIZE}
            )
            _warm_up(asked, backend)
            yield asked


def pictures(directory: Path, count: int) -> list[Path]:
    """Return JPEGs whose longer side is 640 px: real ones where there are some, else drawn ones."""
    found = sorted((_SHARED / "datasets" / "pet_hdpe_det" / "images").rglob("*.jpg"))[:count]
    made = []
    for i in range(count):
        file = directory / f"{i}.jpg"
        if i < len(found):
            with Image.open(found[i]) as picture:
                scale = IMG_SIZE / max(picture.size)
                size = round(picture.width * scale), round(picture.height * scale)
                picture.convert("RGB").resize(size).save(file, quality=90)
        else:
            file.write_bytes(encode(draw_scene(np.random.default_rng([7, i]), IMG_SIZE)))
        made.append(file)
    return made


def detector(directory: Path) -> Path:
    """Return a YOLO11n that has learnt something, where there is one; else random weights."""
    trained = _SHARED / "models" / "pet_hdpe_yolo11n.pt"
    return trained if trained.exists() else tiny_model.make(directory / "random.pt")


def _warm_up(asked: Inferring, backend: str) -> None:
    """Have the engine started, and with `auto` its backend chosen: torch answers until then."""
    pause = threading.Event()
    ends_s = time.monotonic() + TIMEOUT_S
    while asked.infer(asked.urls[0]).result["backend"] == "torch-cpu" and backend == "auto":
        if time.monotonic() > ends_s:
            break  # torch may well be the fastest; the figures name the backend
        pause.wait(2)  # what is measured meanwhile wants the machine for itself
    for url in asked.urls:
        asked.infer(url)
