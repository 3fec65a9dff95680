"""Inferences through server, worker and engine against plain `YOLO.predict`, in one run and by turns."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from benchmarks.inference_stage import IMG_SIZE, Ended, Inferring, detector, inferring, pictures
from benchmarks.plain_yolo import PlainYolo
from benchmarks.stage import percentile, seconds_between

BACKENDS = ("torch", "auto")
ROUNDS, FRAUD_CHECKS = 40, 60
#: Jobs of each of two streams.
MIXED = int(os.environ.get("INFERENCE_MIXED", "1000"))
_MODELS = "decoding and detecting"
#: The streams' options. A detector with random weights finds more than either may tell.
STREAMS: tuple[dict[str, Any], ...] = (
    {"confidence_threshold": 0.0005, "max_detections": 7, "img_size": 160},
    {"confidence_threshold": 0.001, "max_detections": 3, "img_size": 192},
)


def measure() -> list[Figure]:
    """Measure with each backend."""
    with tempfile.TemporaryDirectory(prefix="rvmcv-inference-") as name:
        directory = Path(name)
        model, files = detector(directory), pictures(directory, 10)
        figures = []
        with PlainYolo(model, directory, IMG_SIZE) as plain:
            for file in files:
                plain.predict_ms(file)
            for backend in BACKENDS:
                with inferring(model, files, backend) as asked:
                    chosen = asked.infer(asked.urls[0]).result
                    called = f"{backend} ({chosen['backend']} {chosen['precision']})"
                    figures += _alone(called, asked, plain)
                    figures += _ten(called, asked)
                    figures += _beside_a_batch(called, asked)
                    if backend == BACKENDS[0]:
                        figures.append(_mixed(asked))
    return figures


def _alone(called: str, asked: Inferring, plain: PlainYolo) -> list[Figure]:
    """One picture at a time, by turns with plain Ultralytics and with the picture from a cheap server."""
    ours: list[Ended] = []
    cheap: list[Ended] = []
    plain_ms = []
    pause = threading.Event()
    for _ in range(ROUNDS):
        pause.wait(0.1)  # nothing of the last job is left to do, and the next poll is held
        plain_ms.append(plain.predict_ms(asked.files[0]))
        for into, url in ((ours, asked.urls[0]), (cheap, asked.cheap_url)):
            pause.wait(0.1)
            into.append(asked.infer(url))
    took_ms, peer_ms = _median_ms(ours), statistics.median(plain_ms)
    peer = "YOLO.predict"
    shares = {what: statistics.median(_shares(one)[what] for one in ours) for what in _shares(ours[0])}
    return [
        Figure(f"{called}: queued to result, p50", took_ms, "ms", "", peer, peer_ms),
        Figure(f"{called}: the same, minus YOLO.predict", took_ms - peer_ms, "ms", "<= 25"),
        Figure(
            f"{called}: the same, minus decoding and detecting",
            statistics.median(one.took_ms - _shares(one)[_MODELS] for one in ours),
            "ms",
        ),
        Figure(
            f"{called}: minus YOLO.predict, image from a cheap server",
            _median_ms(cheap) - peer_ms,
            "ms",
            "<= 25",
        ),
        *(Figure(f"{called}: of it {what}", share_ms, "ms") for what, share_ms in shares.items()),
    ]


def _median_ms(ended: list[Ended]) -> float:
    return statistics.median(one.took_ms for one in ended)


def _shares(ended: Ended) -> dict[str, float]:
    """Where the time of one inference went, in milliseconds."""
    job = ended.job
    steps = job["result"]["timings"]
    claimed_ms = 1000 * seconds_between(job["created_at"], job["started_at"])
    download_ms = 1000 * job["timings"]["download"]
    infer_ms = 1000 * job["timings"]["infer"]
    models_ms = 1000 * sum(steps[step] for step in ("decode", "detect", "segment", "encode"))
    return {
        "queued to claimed": claimed_ms,
        "fetching the image from the embedded store": download_ms,
        _MODELS: models_ms,
        "to the engine and back": infer_ms - models_ms,
        "wiping, reporting": ended.took_ms - claimed_ms - download_ms - infer_ms,
    }


def _ten(called: str, asked: Inferring) -> list[Figure]:
    """Ten pictures as one batch, and as ten jobs queued at once: the middle one of five runs."""
    batches, at_once = [], []
    for _ in range(5):
        start_s = time.monotonic()
        batches += asked.wait([asked.queue_batch(asked.urls)], start_s)
        start_s = time.monotonic()
        job_ids = [asked.queue(url) for url in asked.urls]
        at_once.append(asked.wait(job_ids, start_s)[-1])
    return [
        Figure(f"{called}: 10 images in one request", _median_ms(batches) / 1000, "s", "< 1"),
        Figure(f"{called}: 10 requests at once", _median_ms(at_once) / 1000, "s", "< 1"),
    ]


def _beside_a_batch(called: str, asked: Inferring) -> list[Figure]:
    """Fraud checks, one after the other: on an idle worker, then while a batch runs."""
    check = {"purpose": "fraud_check", "edge_result": {"detections": []}}

    def check_ms(i: int) -> float:
        return asked.infer(asked.urls[i % len(asked.urls)], **check).took_ms

    idle = [check_ms(i) for i in range(FRAUD_CHECKS)]
    batch_id = asked.queue_batch(asked.urls * 200)
    asked.server.wait_for_job(batch_id, lambda job: bool((job["progress"] or {}).get("images_done")), 60)
    busy = [check_ms(i) for i in range(FRAUD_CHECKS)]
    if asked.server.job(batch_id)["finished_at"] is not None:
        raise RuntimeError("the batch ended before the fraud checks did")
    asked.server.cancel(batch_id)
    asked.server.wait_until_final(batch_id, 60)
    return [
        Figure(f"{called}: fraud checks, p50", statistics.median(idle), "ms"),
        Figure(
            f"{called}: fraud checks during a batch, p95",
            percentile(busy, 0.95),
            "ms",
            "<= 2 x idle",
            "idle",
            percentile(idle, 0.95),
        ),
    ]


def _mixed(asked: Inferring) -> Figure:
    """Two streams at once with different options: each answer must be what its options alone give."""
    expected = [asked.infer(asked.urls[0], **options).result["detections"] for options in STREAMS]
    if not all(expected) or expected[0] == expected[1]:
        raise RuntimeError("the options of the two streams give the same answers: nothing could be seen")

    def wrong_of(number: int) -> int:
        wrong = 0
        for first in range(0, MIXED, 4):  # four at once of each, eight places
            start_s = time.monotonic()
            some = range(first, min(first + 4, MIXED))
            job_ids = [asked.queue(asked.urls[0], **STREAMS[number]) for _ in some]
            for ended in asked.wait(job_ids, start_s):
                wrong += ended.result["detections"] != expected[number]
        return wrong

    with ThreadPoolExecutor(len(STREAMS)) as streams:
        wrong = sum(streams.map(wrong_of, range(len(STREAMS))))
    return Figure(f"two streams of {MIXED} requests with other options: mixed", wrong, "results", "0")
