"""Data sets: their rows and their archives."""

from __future__ import annotations

from pathlib import Path

from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.storage import Storage, StoredObject
from rvmcv_worker.reference.tables import Dataset


class DatasetShelf:
    """Stores archives under their hashes, and finds them by id."""

    def __init__(self, queue: Queue, storage: Storage) -> None:
        self._queue = queue
        self._storage = storage

    def add_file(
        self, name: str, file_name: str, file: Path, found: StoredObject, images_count: int | None = None
    ) -> Dataset:
        """Store an archive and its row."""
        suffix = "".join(c for c in Path(file_name).suffix if c.isalnum())[:8] or "zip"
        path = self._storage.put_file("datasets", f"{found.sha256}.{suffix}", file)
        with self._queue.turn() as turn:
            dataset = Dataset(
                name=name,
                path=path,
                sha256=found.sha256,
                size_bytes=found.size_bytes,
                images_count=images_count,
                created_at=turn.now,
            )
            turn.session.add(dataset)
        return dataset

    def find(self, dataset_id: int) -> Dataset | None:
        """Return a data set's row."""
        with self._queue.look() as turn:
            return turn.session.get(Dataset, dataset_id)
