"""A training through the worker against plain Ultralytics: same settings, same seed, CPU, same drawn data."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import psutil

from benchmarks.figures import Figure
from benchmarks.stage import stage
from rvmcv_worker.demo.drawing import draw_zip

EPOCHS, IMG_SIZE, BATCH, SEED = 6, 128, 8, 7
#: Settings under which so short a training learns enough to be compared.
OPTIONS = {"nbs": 8, "optimizer": "AdamW", "lr0": 0.003, "warmup_epochs": 1.0, "mosaic": 0.0}
METRICS = ("precision", "recall", "mAP50", "mAP50-95")
#: Plain Ultralytics, as a practitioner would call it; prints the metrics of best.pt.
PLAIN = """
import json, sys
from pathlib import Path
from ultralytics import YOLO
data, epochs, imgsz, batch, seed = sys.argv[1], *map(int, sys.argv[2:6])
options = json.loads(sys.argv[6])
model = YOLO("yolo11n.yaml")
found = model.train(data=data, epochs=epochs, imgsz=imgsz, batch=batch, seed=seed, device="cpu", workers=0,
                    patience=50, project=str(Path.cwd() / "runs"), name="plain", **options).results_dict
print(json.dumps({key.removeprefix("metrics/").removesuffix("(B)"): value for key, value in found.items()}))
"""


def measure() -> list[Figure]:
    """Train twice; compare metrics, and the CPU time of the daemon with that of the plain training."""
    with tempfile.TemporaryDirectory(prefix="rvmcv-parity-") as directory:
        archive = Path(directory, "drawn.zip")
        draw_zip(archive, train=200, val=40, test=0, size_px=IMG_SIZE, seed=SEED)
        ours, daemon_cpu_s = _through_the_worker(archive)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        plain = _plain(Path(directory), archive)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        plain_cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figures = [
        Figure(
            f"training through the worker, {name}",
            ours[name],
            "",
            "equal to 4 digits",
            "YOLO.train",
            plain[name],
        )
        for name in METRICS
    ]
    differ = sum(round(ours[name], 4) != round(plain[name], 4) for name in METRICS)
    return [
        *figures,
        Figure("metrics that differ in the first four digits", differ, "metrics", "0"),
        Figure(
            "daemon's CPU time during a training",
            daemon_cpu_s,
            "s",
            "<= 1 %",
            "the same training alone",
            plain_cpu_s,
        ),
    ]


def _through_the_worker(archive: Path) -> tuple[dict[str, float], float]:
    with stage(job_types=("yolo11",)) as (server, worker):
        url = server.put_object("datasets", "drawn.zip", archive)
        config = {
            "dataset_url": url,
            "base_model": "yolo11n.yaml",
            "epochs": EPOCHS,
            "img_size": IMG_SIZE,
            "batch_size": BATCH,
            "seed": SEED,
            **OPTIONS,
        }
        process = psutil.Process(worker.pid)
        before = process.cpu_times()
        job = server.wait_until_final(server.queue_training(config), 900)
        if job["status"] != "completed":
            raise RuntimeError(f"the training ended {job['status']}: {job['error']}")
        after = process.cpu_times()
    daemon_s = after.user + after.system - before.user - before.system
    return job["result"]["metrics"], daemon_s


def _plain(directory: Path, archive: Path) -> dict[str, float]:
    data = directory / "data"
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(data)  # our own drawing
    (yaml,) = data.glob("**/data.yaml")
    here = directory / "plain"
    here.mkdir()
    config_dir = here / "config"
    config_dir.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(here),
        "YOLO_CONFIG_DIR": str(config_dir),
        "YOLO_OFFLINE": "1",
        "YOLO_AUTOINSTALL": "0",
    }
    arguments = [
        str(yaml.resolve()),
        *(str(value) for value in (EPOCHS, IMG_SIZE, BATCH, SEED)),
        json.dumps(OPTIONS),
    ]
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, *arguments],
        cwd=here,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return found
