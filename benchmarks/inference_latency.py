"""One picture of 640 px, queued to result, warm, over loopback, less what `YOLO.predict` takes for it.

Both run torch on the same file, by turns, so that what else the machine does meets both.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from benchmarks.figures import Figure
from benchmarks.stage import percentile, seconds_between, stage
from rvmcv_worker.reference.server import ReferenceServer
from tests import tiny_model

JOBS, TURNS = 20, 5
_SHARED = Path(os.environ.get("RVMCV_SHARED", Path(__file__).parents[2] / "shared"))
#: Plain Ultralytics, warm: for each line of standard input so many pictures, and the milliseconds of each.
PLAIN = """
import sys, time
told, sys.stdout = sys.stdout, sys.stderr  # Ultralytics prints too
from ultralytics import YOLO
model = YOLO(sys.argv[1])
model.predict(sys.argv[2], verbose=False, device="cpu", imgsz=640)
for line in sys.stdin:
    took_ms = []
    for _ in range(int(line)):
        start_s = time.perf_counter()
        model.predict(sys.argv[2], verbose=False, device="cpu", imgsz=640)
        took_ms.append(1000 * (time.perf_counter() - start_s))
    print(*took_ms, file=told, flush=True)
"""


def measure() -> list[Figure]:
    """Ask one after another; the first are not counted."""
    with (
        tempfile.TemporaryDirectory(prefix="rvmcv-inference-") as name,
        stage(job_types=("inference",), extra={"inference": {"backend": "torch"}}) as (server, _worker),
    ):
        directory = Path(name)
        model, picture = _model(directory), _picture(directory)
        server.add_model(model, model_name="yolo11", version="bench", active=True)
        url = server.put_object("datasets", picture.name, picture)
        ours_ms: list[float] = []
        plain_ms: list[float] = []
        _ask(server, url, 3)
        with _plain(directory, model, picture) as plain:
            for _ in range(TURNS):
                ours_ms += _ask(server, url, JOBS)
                plain_ms += plain(JOBS)
    less_ms = statistics.median(ours_ms) - statistics.median(plain_ms)
    return [
        Figure("one image, queued to result, less YOLO.predict, p50", less_ms, "ms", "<= 25"),
        Figure(
            "one image, queued to result, p50",
            statistics.median(ours_ms),
            "ms",
            "",
            "YOLO.predict",
            statistics.median(plain_ms),
        ),
        Figure("one image, queued to result, p95", percentile(ours_ms, 0.95), "ms"),
    ]


def _model(directory: Path) -> Path:
    trained = _SHARED / "models" / "pet_hdpe_yolo11n.pt"
    return trained if trained.exists() else tiny_model.make(directory / "tiny.pt")


def _picture(directory: Path) -> Path:
    """Return a real picture, made 640 px square, or a drawn one."""
    found = sorted((_SHARED / "datasets").glob("pet_hdpe_det/images/val/*.jpg"))
    with Image.open(found[0]) if found else Image.effect_noise((640, 640), 64) as image:
        image.convert("RGB").resize((640, 640)).save(directory / "picture.jpg", quality=90)
    return directory / "picture.jpg"


def _ask(server: ReferenceServer, url: str, times: int) -> list[float]:
    (model,) = server.models()
    config = {
        "image_url": url,
        "model_version": "bench",
        "model_sha256": model["sha256_hash"],
        "img_size": 640,
    }
    took_ms = []
    pause = threading.Event()
    for _ in range(times):
        pause.wait(0.1)  # the poll that follows a job is held again
        job = server.wait_until_final(server.queue_inference(config), 60)
        assert job["status"] == "completed", job["error"]
        took_ms.append(1000 * seconds_between(job["created_at"], job["finished_at"]))
    return took_ms


@contextmanager
def _plain(directory: Path, model: Path, picture: Path) -> Iterator[Callable[[int], list[float]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PLAIN, str(model), str(picture)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "YOLO_CONFIG_DIR": str(directory), "YOLO_OFFLINE": "true"},
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin
    assert stdout

    def predict(times: int) -> list[float]:
        stdin.write(f"{times}\n")
        stdin.flush()
        return [float(took) for took in stdout.readline().split()]

    with process:
        yield predict
        stdin.close()
