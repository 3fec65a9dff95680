"""Batches end to end, against `YOLO.predict` over the same files; bad images, and memory over many.

The pictures are those of `shared/` where it is, else drawn ones; they are served by this process, so that the
machine carries both ends of each download.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.figures import Figure
from benchmarks.stage import seconds_between, stage
from rvmcv_worker.reference.server import ReferenceServer
from tests import tiny_model
from tests.file_server import FileServer, give
from tests.worker_process import WorkerProcess

IMAGES = int(os.environ.get("BATCH_IMAGES", "1000"))
MANY = int(os.environ.get("BATCH_MANY", "10000"))
#: Different pictures; a batch repeats them.
PICTURES = 100
IMG_SIZE, SMALL_PX = 640, 160
#: How long the worker may measure backends before the batches are timed, in seconds.
EXPORT_S = 400.0
_SHARED = Path(os.environ.get("RVMCV_SHARED", Path(__file__).parents[2] / "shared"))
#: Plain Ultralytics, as a practitioner would call it, warm; prints seconds. Given the list's file and not a
#: list: that it would take for one batch, a gigabyte for every hundred images.
PLAIN = """
import sys, time
from pathlib import Path
from ultralytics import YOLO
files = Path(sys.argv[2]).read_text().split("\\n")
model = YOLO(sys.argv[1])
options = {"imgsz": int(sys.argv[3]), "verbose": False, "device": "cpu"}
model.predict(files[0], **options)
start_s = time.monotonic()
for result in model.predict(sys.argv[2], stream=True, batch=1, **options):
    boxes = result.boxes.xyxy.tolist(), result.boxes.conf.tolist(), result.boxes.cls.tolist()
print(time.monotonic() - start_s)
"""


def measure() -> list[Figure]:
    """Time both over natural and square pictures, then look at bad images and at memory."""
    with (
        tempfile.TemporaryDirectory(prefix="rvmcv-batch-") as name,
        FileServer() as files,
        stage(
            job_types=("batch-inference",),
            extra={"storage": {"plain_http_hosts": [files.place]}},
        ) as (server, worker),
    ):
        directory = Path(name)
        bench = _Bench(directory, files, server, worker, _model(directory))
        server.add_model(bench.model, model_name="yolo11", version="bench", active=True)
        kinds = {"natural": _natural(directory / "natural"), "square": _square(directory / "square")}
        for pictures in kinds.values():
            bench.warm_up(pictures, IMG_SIZE)
        figures = []
        for kind, goal in (("natural", ">= 2 x"), ("square", ">= 3 x")):
            figures.append(bench.race(kind, kinds[kind], goal))
        return [*figures, *bench.many(_drawn(directory / "small", SMALL_PX, SMALL_PX))]


@dataclass(frozen=True)
class _Bench:
    """What all measurements share."""

    directory: Path
    files: FileServer
    server: ReferenceServer
    worker: WorkerProcess
    model: Path

    def warm_up(self, pictures: list[Path], img_size: int) -> None:
        """Run small batches until the worker has chosen what runs the model, or has had its time."""
        until_s = time.monotonic() + EXPORT_S
        while time.monotonic() < until_s:
            result = self.run(pictures[:20], img_size=img_size)["result"]
            if result["backend"] != "torch-cpu":
                return

    def run(self, pictures: list[Path], **options: Any) -> dict[str, Any]:
        """Run one batch over the pictures, in their order; a path that is not there is a missing image."""
        for path in set(pictures):
            if path.exists():
                self.files.script.setdefault(f"/{path.parent.name}/{path.name}", [give(path.read_bytes())])
        lines = (
            json.dumps({"id": number, "url": f"{self.files.url}/{path.parent.name}/{path.name}"})
            for number, path in enumerate(pictures)
        )
        manifest = self.directory / "manifest.jsonl"
        manifest.write_text("\n".join(lines))
        url = self.server.put_object("datasets", "manifest.jsonl", manifest)
        config = {"manifest_url": url, "model_active": True, **options}
        job = self.server.wait_until_final(self.server.queue_batch(config), 3600)
        assert job["status"] == "completed", job["error"]
        return job

    def race(self, kind: str, pictures: list[Path], goal: str) -> Figure:
        """Return images a second, from the claim to the accepted report, beside plain Ultralytics'."""
        repeated = list(itertools.islice(itertools.cycle(pictures), IMAGES))
        job = self.run(repeated, img_size=IMG_SIZE)
        ours_s = seconds_between(job["started_at"], job["finished_at"])
        listed = self.directory / "files.txt"
        listed.write_text("\n".join(map(str, repeated)))
        plain = subprocess.run(
            [sys.executable, "-c", PLAIN, str(self.model), str(listed), str(IMG_SIZE)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "YOLO_CONFIG_DIR": str(self.directory), "YOLO_OFFLINE": "true"},
        )
        plain_s = float(plain.stdout.strip().splitlines()[-1])
        backend = f"{job['result']['backend']} {job['result']['precision']}"
        name = f"batch of {IMAGES} {kind} images, {backend}"
        return Figure(name, IMAGES / ours_s, "images/s", goal, "YOLO.predict", IMAGES / plain_s)

    def many(self, pictures: list[Path]) -> list[Figure]:
        """Run a long batch with one bad image in each thousand; count results, watch memory."""
        repeated = list(itertools.islice(itertools.cycle(pictures), MANY))
        for index in range(min(500, MANY // 2), MANY, 1000):
            repeated[index] = pictures[0].with_name("missing.jpg")
        self.warm_up(pictures, SMALL_PX)
        bad = sum(path.name == "missing.jpg" for path in repeated)
        with _memory(self.worker) as samples:
            job = self.run(repeated, img_size=SMALL_PX)
        result = job["result"]
        ids = [line["id"] for line in _lines(self.server, job)]
        assert ids == list(range(MANY)), "a result is missing, double or out of order"
        figures = [
            Figure(f"results of {MANY} images, {bad} of them bad", result["images_ok"], "", str(MANY - bad)),
            Figure("error lines of them", result["images_failed"], "", str(bad)),
        ]
        for index, who in enumerate(("daemon", "engine"), 1):
            held = [(done, sample[index - 1]) for done, *sample in samples]
            warm = statistics.median(mb for done, mb in held if MANY * 0.1 <= done <= MANY * 0.2)
            last = statistics.median(mb for done, mb in held if done >= MANY * 0.9)
            figures.append(
                Figure(f"{who}, last tenth of {MANY} images", last, "MB", "<= 1.05 x", "second tenth", warm)
            )
        return figures


@contextmanager
def _memory(worker: WorkerProcess) -> Iterator[list[tuple[int, float, float]]]:
    """Note every half second (images done, MB of the daemon, MB of the engine and what is around it)."""
    samples: list[tuple[int, float, float]] = []
    ended = threading.Event()
    daemon = psutil.Process(worker.pid)

    def watch() -> None:
        while not ended.wait(0.5):
            running = _status(worker)["running"]
            if running and running[0]["images_done"] is not None:
                around = sum(_mb(process) for process in daemon.children(recursive=True))
                samples.append((running[0]["images_done"], _mb(daemon), around))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        ended.set()
        watcher.join()


def _mb(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().uss) / 1e6
    except psutil.NoSuchProcess:
        return 0.0


def _status(worker: WorkerProcess) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "rvmcv_worker.cli",
        "status",
        "--json",
        "--config",
        str(worker.config_file),
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    status: dict[str, Any] = json.loads(said.stdout)
    return status


def _lines(server: ReferenceServer, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in job["result"]["parts"]:
        yield from map(json.loads, gzip.decompress(server.read_object(part["path"])).splitlines())


def _model(directory: Path) -> Path:
    trained = _SHARED / "models" / "pet_hdpe_yolo11n.pt"
    return trained if trained.exists() else tiny_model.make(directory / "tiny.pt")


def _natural(directory: Path) -> list[Path]:
    """Return pictures of many shapes."""
    found = sorted((_SHARED / "datasets").glob("*/images/*/*.jpg"))
    if len(found) < PICTURES:
        dice = random.Random(5)
        shapes = [(dice.choice((480, 640, 720)), dice.choice((480, 640, 960))) for _ in range(20)]
        return [path for shape in shapes for path in _drawn(directory, *shape, count=PICTURES // 20)]
    directory.mkdir()
    chosen = random.Random(5).sample(found, PICTURES)
    return [_saved(path.read_bytes(), directory / f"{number}.jpg") for number, path in enumerate(chosen)]


def _square(directory: Path) -> list[Path]:
    """Return the natural pictures, each made square."""
    directory.mkdir()
    squares = []
    for path in _natural(directory / "natural"):
        packed = io.BytesIO()
        Image.open(path).convert("RGB").resize((IMG_SIZE, IMG_SIZE)).save(packed, "JPEG", quality=90)
        squares.append(_saved(packed.getvalue(), directory / path.name))
    return squares


def _drawn(directory: Path, width: int, height: int, count: int = 50) -> list[Path]:
    """Return pictures of coloured blocks."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number in range(count):
        blocks = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        packed = io.BytesIO()
        Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(packed, "JPEG")
        pictures.append(_saved(packed.getvalue(), directory / f"{width}x{height}-{number}.jpg"))
    return pictures


def _saved(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    return path
