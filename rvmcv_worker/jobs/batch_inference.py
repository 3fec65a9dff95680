"""`batch-inference`: a list of images through one model, the results in parts in storage."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvmcv_worker import batch_checkpoint, batch_summary, manifest
from rvmcv_worker.batch_checkpoint import BatchCheckpoint
from rvmcv_worker.batch_parts import BatchParts
from rvmcv_worker.engine_wire import Queue
from rvmcv_worker.errors import DatasetUnavailableError, InvalidJobError, JobError, WorkerStoppedError
from rvmcv_worker.events import Event, event
from rvmcv_worker.in_order import in_order
from rvmcv_worker.jobs import batch_config
from rvmcv_worker.jobs.batch_config import BatchConfig
from rvmcv_worker.jobs.batch_images import BatchImages, Outcome
from rvmcv_worker.jobs.model_choice import Chosen, choose
from rvmcv_worker.ledger import ClaimState
from rvmcv_worker.logs import redact
from rvmcv_worker.state import Lane
from rvmcv_worker.uploads import NoStorageError

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt
    from rvmcv_worker.protocol import JobOffer

_MB = 1024**2
#: The checkpoint names every part, and so does the result.
_MAX_PARTS = 1000
#: So many images in a row that did not come, or broke the engine: then it is not the images. The job ends,
#: and an attempt that follows does those of the unfinished part again.
_MAX_IN_A_ROW = 20


class BatchInference:
    """The job type; stateless, one for the daemon's life."""

    name = "batch-inference"
    lane = Lane.BATCH

    def parse(self, config: Mapping[str, Any]) -> BatchConfig:
        """Return the validated config; raises `InvalidJobError`."""
        return batch_config.parse(config)

    def gpus(self, _config: Mapping[str, Any], /) -> int:
        """Return 1: the engine's GPU is nobody's place."""
        return 1

    def run(self, attempt: Attempt, config: BatchConfig) -> dict[str, Any]:
        """Go on where the last attempt left off, to the end of the list."""
        if not attempt.services.storage.can_store:
            raise NoStorageError("a batch needs storage for its parts: no MinIO keys, and no job-uploads")
        with attempt.phase("download"):
            path, list_sha256 = _fetch_list(attempt, config)
            images_total = _survey(path, config)
            chosen = choose(attempt, config)
            left_off = _left_off(attempt, config, chosen, list_sha256, images_total)
        attempt.enter(ClaimState.RUNNING)
        with attempt.phase("infer"):
            done = _infer(attempt, config, chosen, path, images_total, left_off)
        attempt.progress.confirm("upload")
        _say_what_failed(attempt, done.summary)
        return {
            "images_total": images_total,
            **done.summary.told(),
            "purpose": config.purpose,
            "model_used": chosen.model_used,
            "model_sha256": chosen.model_sha256,
            **({"segmenter_used": chosen.segmenter_used} if chosen.segmenter_used else {}),
            "parts": [part.model_dump() for part in done.parts],
        }

    def courtesy(self, _offer: JobOffer, _report: Mapping[str, Any], /) -> None:
        """No call follows."""


def _fetch_list(attempt: Attempt, config: BatchConfig) -> tuple[Path, str]:
    """Bring the list into the workspace; returns it with its sha256."""
    path = attempt.workspace.in_dir / "manifest.jsonl"
    if config.manifest_url is None:
        manifest.write(config.images or [], path)
        return path, hashlib.sha256(path.read_bytes()).hexdigest()
    fetched = attempt.services.storage.fetch(
        config.manifest_url,
        path,
        max_bytes=int(attempt.services.settings.inference.max_manifest_mb * _MB),
        sha256=config.manifest_sha256,
        interrupt=attempt.interrupt,
        unavailable=DatasetUnavailableError,
    )
    return path, fetched.sha256


def _survey(path: Path, config: BatchConfig) -> int:
    """Return how many images are listed; raises `DatasetInvalidError` or `InvalidJobError`."""
    images_total = manifest.survey(path, "the manifest" if config.manifest_url else "config.images")
    if images_total > _MAX_PARTS * config.part_size:
        least = -(-images_total // _MAX_PARTS)
        raise InvalidJobError(
            f"config.part_size: {config.part_size} would make more than {_MAX_PARTS} parts of {images_total}"
            f" images; it must be at least {least}"
        )
    return images_total


def _left_off(
    attempt: Attempt, config: BatchConfig, chosen: Chosen, list_sha256: str, images_total: int
) -> BatchCheckpoint:
    """Return where the last attempt at this batch left off, or its beginning."""
    models = {
        "model": chosen.model_sha256,
        "segmenter": chosen.segmenter_used,
        "sam2": chosen.segmenter_sha256,
    }
    sha256 = batch_checkpoint.batch_sha256(list_sha256, {**config.asked(), **models})
    found = attempt.fetch_checkpoint(batch_checkpoint.MAX_BYTES)
    return batch_checkpoint.read(attempt.workspace.root / found if found else None, sha256, images_total)


def _infer(
    attempt: Attempt,
    config: BatchConfig,
    chosen: Chosen,
    path: Path,
    images_total: int,
    left_off: BatchCheckpoint,
) -> BatchCheckpoint:
    asked_at_once = attempt.services.engines.at_once(chosen.trust)
    images = BatchImages(attempt, chosen.ask(config, Queue.BATCH), asked_at_once=asked_at_once)
    told = _Progress(attempt, left_off.next_index, images_total)
    in_a_row = 0
    with BatchParts(
        attempt.workspace.out_dir,
        left_off,
        lambda file, name, interrupt: attempt.store(file, name, interrupt=interrupt),
        part_size=config.part_size,
        interrupt=attempt.interrupt,
        on_checkpoint=attempt.checkpoints.know,
    ) as parts:
        try:
            entries = manifest.read(path, left_off.next_index)
            with contextlib.closing(in_order(images.outcome, entries, threads=images.threads)) as outcomes:
                for outcome in outcomes:
                    in_a_row = in_a_row + 1 if outcome.suspicious else 0
                    if outcome.error is not None and in_a_row >= _MAX_IN_A_ROW:
                        raise _too_many(outcome.error, in_a_row)
                    _count(parts.summary, outcome)
                    parts.add(_line(outcome))
                    told.done()
            return parts.finish()
        except WorkerStoppedError:
            parts.save()
            raise


def _too_many(error: JobError, in_a_row: int) -> JobError:
    return type(error)(
        f"{in_a_row} images in a row failed, so it is not the images; the last: {error.message}"
    )


def _count(summary: batch_summary.BatchSummary, outcome: Outcome) -> None:
    if outcome.result is not None:
        summary.add(outcome.result.result)
    elif outcome.error is not None:
        summary.add_error(outcome.error.code)


def _say_what_failed(attempt: Attempt, summary: batch_summary.BatchSummary) -> None:
    if summary.images_failed:
        codes = ", ".join(f"{code} {count}" for code, count in summary.errors.most_common())
        event(Event.JOB_INCOMPLETE, attempt.offer.job_id).warning(
            "images without a result: {} ({}); the job's result says which, nothing to do",
            summary.images_failed,
            codes,
        )


def _line(outcome: Outcome) -> dict[str, Any]:
    """Return an image's line in a part."""
    line: dict[str, Any] = {"index": outcome.entry.index, "id": outcome.entry.id}
    if outcome.result is None:
        assert outcome.error is not None
        error = outcome.error.to_wire()
        return {**line, "ok": False, "error": {**error, "message": redact(error["message"])}}
    result = outcome.result.result
    line |= {"ok": True, "image_size": result["image_size"], "detections": result["detections"]}
    line |= {"processing_time_ms": round(batch_summary.processing_ms(result), 1)}
    line |= {"backend": result["backend"], "precision": result["precision"]}
    return line | ({"annotated_path": outcome.picture_path} if outcome.picture_path else {})


class _Progress:
    """How far the batch is, told with each image: the reporter sends no more than RVM-Server wants."""

    def __init__(self, attempt: Attempt, done: int, total: int) -> None:
        self._attempt = attempt
        self._before = self._done = done
        self._total = total
        self._start_s = time.monotonic()
        self._tell(None)

    def done(self) -> None:
        """One more image is."""
        self._done += 1
        spent_s = time.monotonic() - self._start_s
        self._tell((self._total - self._done) * spent_s / (self._done - self._before))

    def _tell(self, eta_s: float | None) -> None:
        self._attempt.progress.update(
            images_done=self._done,
            images_total=self._total,
            fraction=self._done / self._total,
            eta_s=None if eta_s is None else round(eta_s, 1),
        )
