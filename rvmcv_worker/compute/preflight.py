"""Look at every image and every label file once, before anything trains on them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rvmcv_worker.compute.faults import Fault, FaultKind, FaultLog
from rvmcv_worker.compute.image_header import inspect_image
from rvmcv_worker.compute.label_source import Source
from rvmcv_worker.compute.labels import Label
from rvmcv_worker.compute.layouts import Item
from rvmcv_worker.errors import ImageInvalidError

#: Decoding and hashing leave the interpreter's lock alone, so a second thread has work on a second core.
_THREADS = 2
_CHUNK = 128


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of one image and its labels."""

    bad: bool
    #: Class of each instance that trains.
    classes: tuple[int, ...]
    sha256: bytes
    dhash: int | None
    #: New text for the label file, None when it stays as it is.
    rewritten: str | None
    #: (height, width) of the upright image, where it was decoded.
    size: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Check:
    """What the samples are held against."""

    unpacked: Path
    source: Source
    max_pixels: int
    #: Whether each image is decoded in full, as a training on its pixels will, to learn its size.
    decode: bool = False


def inspect_all(
    items: Iterable[Item], check: Check, log: FaultLog, tick: Callable[[int, int], None]
) -> dict[str, Sample]:
    """Return a sample for each image, by its path in the archive; faults go to `log`, in the paths' order.

    `tick(done, total)` is called every few images and may raise to stop.
    """
    unique = sorted({item.image: item for item in items}.values(), key=lambda item: item.image)
    samples: dict[str, Sample] = {}
    with ThreadPoolExecutor(_THREADS) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about EXIF and the like, would flood the log
        for start in range(0, len(unique), _CHUNK):
            tick(start, len(unique))
            chunk = unique[start : start + _CHUNK]
            for item, (sample, image_fault, label) in zip(
                chunk, pool.map(lambda item: _inspect(item, check), chunk), strict=True
            ):
                samples[item.image] = sample
                if image_fault:
                    log.add(item.image, image_fault)
                for fault in label.faults:
                    log.add(check.source.blamed(item), fault)
    tick(len(unique), len(unique))
    return samples


def _inspect(item: Item, check: Check) -> tuple[Sample, Fault | None, Label]:
    path = check.unpacked / item.image
    content = path.read_bytes()
    facts = inspect_image(content, check.max_pixels)
    if facts.restored is not None:
        path.write_bytes(facts.restored)
    fault, size = facts.fault, None
    if check.decode and not facts.bad:
        from rvmcv_worker.compute.image_decode import decode  # OpenCV, which nothing else here needs

        try:
            height, width, _ = decode(facts.restored or content, check.max_pixels).shape
            size = (height, width)
        except ImageInvalidError as error:
            fault = Fault(FaultKind.TRUNCATED, str(error))
    label = check.source.label(item, size)
    sample = Sample(
        bad=label.bad or facts.bad or (check.decode and size is None),
        classes=label.classes,
        sha256=hashlib.sha256(content).digest(),
        dhash=facts.dhash,
        rewritten=label.rewritten,
        size=size,
    )
    return sample, fault, label
