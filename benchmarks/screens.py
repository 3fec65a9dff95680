"""`make screens`: the screens of README.md anew, from a real worker that has real jobs.

The daemon, behind its wall, trains on a few drawn pictures, refuses a data set that is none, looks at
pictures, and is asked how it is while it trains again. What it then printed stands in README.md between
`<!-- screen NAME -->` and `<!-- /screen NAME -->`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rvmcv_worker.demo.drawing import draw_dataset, draw_zip
from rvmcv_worker.demo.material import DRAWN_TRAINING
from rvmcv_worker.reference.server import ReferenceServer
from tests.worker_process import WorkerProcess, eventually

README = Path(__file__).parents[1] / "README.md"
JOB_TYPES = ("yolo11", "sam2", "inference", "batch-inference")
COLUMNS = 100
TIMEOUT_S = 300.0
_PICTURES, _SIZE_PX = 300, 256
_EPOCHS = 6
_TRAINING = {key: value for key, value in DRAWN_TRAINING.items() if key != "options"} | DRAWN_TRAINING[
    "options"
]
#: A line of the daemon's without a journal: time, level, text.
_STAMPED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) [A-Z]+ +(.*)")


def main() -> int:
    """Make all screens and put them into README.md."""
    with (
        tempfile.TemporaryDirectory(prefix="rvmcv-") as directory,
        _stage(Path(directory)) as (server, worker),
    ):
        screens = {"doctor": _command(worker, "doctor")}
        _have_jobs(server, Path(directory))
        screens["status"] = _command(worker, "status")
        worker.close()
        screens["journal"] = _journal(worker)
    for name, text in screens.items():
        print(text, end="\n\n")
        _put(name, text)
    return 0


@contextlib.contextmanager
def _stage(directory: Path) -> Iterator[tuple[ReferenceServer, WorkerProcess]]:
    """A server at the port that the docs name, and a worker as it is installed, but for its directories."""
    with (
        ReferenceServer(directory / "server", port=8100 if _free(8100) else 0) as server,
        WorkerProcess(
            directory / "vm102",
            server,
            scale=1.0,
            sandbox="required",
            job_types=JOB_TYPES,
            extra={"server": {"poll_wait_s": 25}, "worker": {"log_level": "INFO", "gpu": "none"}},
        ) as worker,
    ):
        eventually(server.workers)
        yield server, worker


def _free(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def _have_jobs(server: ReferenceServer, directory: Path) -> None:
    """Leave the worker in the middle of a training, with ends of several kinds behind it."""
    archive = draw_zip(
        directory / "pictures.zip", train=_PICTURES, val=40, test=0, size_px=_SIZE_PX, seed=11, segment=False
    )
    url = server.put_object("datasets", "bottles-and-cans.zip", archive)
    none = directory / "none.zip"
    none.write_bytes(b"no archive")
    bad_url = server.put_object("datasets", "none.zip", none)
    server.wait_until_final(_train(server, url, epochs=_EPOCHS), TIMEOUT_S)
    (model,) = server.models()
    server.activate(model["id"])
    server.wait_until_final(_train(server, bad_url, epochs=_EPOCHS), TIMEOUT_S)
    draw_dataset(directory / "seen", train=2, val=0, test=0, size_px=_SIZE_PX, seed=12)
    for i, picture in enumerate(sorted((directory / "seen" / "images" / "train").iterdir())):
        image_url = server.put_object("datasets", f"{i}.jpg", picture)
        server.wait_until_final(server.request_inference(image_url=image_url), TIMEOUT_S)
    running = _train(server, url, epochs=100)
    server.wait_for_job(running, lambda job: (job["progress"] or {}).get("epoch", 0) >= 3, TIMEOUT_S)


def _train(server: ReferenceServer, url: str, *, epochs: int) -> str:
    return server.queue_training({**_TRAINING, "dataset_url": url, "epochs": epochs})


def _command(worker: WorkerProcess, name: str) -> str:
    """What a command prints on a terminal of so many columns, without its colours."""
    command = [sys.executable, "-m", "rvmcv_worker.cli", name, "--config", str(worker.config_file)]
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "COLUMNS": str(COLUMNS)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{name} ended with {found.returncode}:\n{found.stdout}{found.stderr}")
    return f"$ rvmcv-worker {name}\n{found.stdout.rstrip()}"


def _journal(worker: WorkerProcess) -> str:
    """Return what the daemon has logged as `journalctl` shows it: the same text behind its own stamp."""
    shown = []
    for line in worker.log().splitlines():
        if found := _STAMPED.fullmatch(line):
            time = datetime.fromisoformat(found.group(1))
            shown.append(f"{time:%b %d %H:%M:%S} vm102 rvmcv-worker[{worker.pid}]: {found.group(2)}")
        else:
            shown.append(line)
    return "\n".join(["$ journalctl -u rvmcv-worker", *shown])


def _put(name: str, text: str) -> None:
    """Replace a block of README.md."""
    begin, end = f"<!-- screen {name} -->\n", f"<!-- /screen {name} -->"
    readme = README.read_text(encoding="utf-8")
    head, found, rest = readme.partition(begin)
    _, found_too, tail = rest.partition(end)
    if not found or not found_too:
        raise RuntimeError(
            f"{README} has no block {name!r}: put {begin.strip()} and {end} where it shall stand"
        )
    README.write_text(f"{head}{begin}```\n{text}\n```\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
