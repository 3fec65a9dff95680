"""Batches: cut into shards, each a job of its own, and shown as one."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlalchemy import select

from rvmcv_worker.reference import inference_wire
from rvmcv_worker.reference.inference_requests import PRIORITIES, resolved
from rvmcv_worker.reference.inference_tables import Batch, InferenceJob
from rvmcv_worker.reference.jobs import enqueue
from rvmcv_worker.reference.manifests import Cut, Piece, cut
from rvmcv_worker.reference.models import ModelShelf
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.refused import FieldRefusedError
from rvmcv_worker.reference.settings import Settings
from rvmcv_worker.reference.storage import ObjectMissingError, Storage
from rvmcv_worker.reference.turn import Turn

JOB_TYPE = "batch-inference"
#: Folder of the shards' lists in storage.
MANIFESTS = "manifests"
#: A list of so few images is part of its job; a longer one would make offers large.
INLINE_IMAGES = 100


@dataclass(frozen=True)
class _Shard:
    """What one job gets beside what all get."""

    images: dict[str, Any]
    count: int | None = None
    first_index: int = 0
    first_line: int = 1


class Batches:
    """Makes batches, shows them, cancels them."""

    def __init__(self, queue: Queue, storage: Storage, models: ModelShelf, settings: Settings) -> None:
        self._queue = queue
        self._storage = storage
        self._models = models
        self._settings = settings

    def add(self, wanted: inference_wire.BatchRequest, asked_by: str) -> Batch:
        """Queue a batch whose images are named in it, or in a list elsewhere."""
        if (wanted.images is None) == (wanted.manifest_url is None):
            raise FieldRefusedError("images", "either images or manifest_url is needed")
        config = self._config(wanted)
        if wanted.images is not None:
            return self._add(config, self._named(wanted.images), asked_by)
        assert wanted.manifest_url is not None
        if not wanted.manifest_url.startswith("s3://"):
            # What does not lie in storage is for the worker to fetch: one job, whatever its length.
            return self._add(
                config, [_Shard(_manifest(wanted.manifest_url, wanted.manifest_sha256))], asked_by
            )
        return self._add(config, self._stored(wanted.manifest_url, wanted.manifest_sha256), asked_by)

    def add_list(self, fields: inference_wire.BatchFields, chunks: Iterable[bytes], asked_by: str) -> Batch:
        """Queue a batch whose list was uploaded."""
        config = self._config(fields)
        with tempfile.TemporaryDirectory(prefix="rvmcv-reference-") as folder:
            found = cut("manifest", chunks, Path(folder), self._settings)
            shards = [self._put(piece) for piece in found.pieces]
        return self._add(config, shards, asked_by)

    def cancel(self, batch_id: str) -> bool:
        """Cancel every shard that is not over; False when there is no such batch, or it is over already."""

        def note(turn: Turn) -> list[str] | None:
            batch = find_batch(turn, batch_id, lock=True)
            if batch is None or batch.status is not None:
                return None
            batch.cancelled_at = batch.cancelled_at or turn.now
            jobs = select(InferenceJob.job_id).where(InferenceJob.batch_id == batch_id)
            return list(turn.session.scalars(jobs.order_by(InferenceJob.job_id)))

        job_ids = self._queue.run(note)
        for job_id in job_ids or ():
            # One at a time: a shard locks its job first and its batch second.
            self._queue.cancel(job_id)
        return job_ids is not None

    def _config(self, wanted: inference_wire.BatchFields) -> dict[str, Any]:
        fields = wanted.model_dump(
            mode="json", exclude_none=True, exclude={"images", "manifest_url", "manifest_sha256"}
        )
        return {**fields, **resolved(self._queue, self._models, wanted)}

    def _named(self, images: list[inference_wire.BatchImage]) -> list[_Shard]:
        listed = [image.model_dump(exclude_none=True) for image in images]
        if len(listed) <= min(INLINE_IMAGES, self._settings.shard_size):
            return [_Shard({"images": listed}, len(listed))]
        lines = (json.dumps(image, separators=(",", ":")).encode() + b"\n" for image in listed)
        with tempfile.TemporaryDirectory(prefix="rvmcv-reference-") as folder:
            return [self._put(piece) for piece in cut("images", lines, Path(folder), self._settings).pieces]

    def _stored(self, url: str, sha256: str | None) -> list[_Shard]:
        with tempfile.TemporaryDirectory(prefix="rvmcv-reference-") as folder:
            try:
                found: Cut = cut("manifest_url", self._storage.read(url), Path(folder), self._settings)
            except ObjectMissingError as error:
                raise FieldRefusedError("manifest_url", str(error)) from None
            if sha256 is not None and sha256 != found.sha256:
                raise FieldRefusedError("manifest_sha256", f"{url} has sha256 {found.sha256}")
            if len(found.pieces) == 1:
                return [_Shard(_manifest(url, found.sha256), found.images)]
            return [self._put(piece) for piece in found.pieces]

    def _put(self, piece: Piece) -> _Shard:
        sha256 = self._storage.put_by_hash(MANIFESTS, piece.file)
        # By this server, not by its path in storage: a worker may have no keys.
        return _Shard(
            _manifest(f"/api/v1/cv/manifests/{sha256}", sha256),
            piece.images,
            piece.first_index,
            piece.first_line,
        )

    def _add(self, config: dict[str, Any], shards: list[_Shard], asked_by: str) -> Batch:
        counts = [shard.count for shard in shards if shard.count is not None]
        priority = PRIORITIES.get(config.get("purpose", ""), 0)
        with self._queue.turn() as turn:
            moment = datetime.fromtimestamp(turn.now, timezone.utc).strftime("%Y%m%d_%H%M%S")
            batch = Batch(
                batch_id=f"batch_{moment}_{secrets.token_hex(4)}",
                purpose=config.get("purpose"),
                config=config,
                images_total=sum(counts) if counts else None,
                shards=len(shards),
                asked_by=asked_by,
                created_at=turn.now,
            )
            turn.session.add(batch)
            for number, shard in enumerate(shards):
                job_id = batch.batch_id if len(shards) == 1 else f"{batch.batch_id}_{number:04d}"
                job = enqueue(turn, JOB_TYPE, {**config, **shard.images}, priority=priority, job_id=job_id)
                assert isinstance(job, InferenceJob)
                job.asked_by, job.batch_id, job.shard = asked_by, batch.batch_id, number
                job.images, job.first_index, job.first_line = shard.count, shard.first_index, shard.first_line
        return batch


def _manifest(url: str, sha256: str | None) -> dict[str, Any]:
    return {"manifest_url": url} if sha256 is None else {"manifest_url": url, "manifest_sha256": sha256}


def find_batch(turn: Turn, batch_id: str, *, lock: bool = False) -> Batch | None:
    """Return a batch's row."""
    query = select(Batch).where(Batch.batch_id == batch_id)
    batch: Batch | None = turn.session.scalar(query.with_for_update() if lock else query)
    return batch
