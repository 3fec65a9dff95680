"""The results of a batch as gzipped JSON Lines, in parts: written one after the other, stored behind that.

After each part a checkpoint is stored that names all parts so far. Everything is inert until the final
report names it.
"""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from rvmcv_worker.batch_checkpoint import BatchCheckpoint, Part
from rvmcv_worker.batch_summary import BatchSummary
from rvmcv_worker.framing import finite
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.protocol import Checkpoint
from rvmcv_worker.uploads import Stored

#: Finished parts that may wait for storage; then the batch waits too.
_WAITING = 2
#: How long a stop of the worker waits for them, in seconds.
_SAVE_S = 12.0
#: How often a batch that waits for storage looks whether it is to end, in seconds.
_LOOK_S = 0.2
#: Level 6 takes twice as long for lines that are 3 % shorter.
_GZIP_LEVEL = 4

#: Puts a file into storage under the attempt's own key.
Put = Callable[[Path, str, Interrupt], Stored]


class _PartFile:
    """A part that is being written: equal lines make equal bytes, since neither time nor name is in them."""

    def __init__(self, path: Path) -> None:
        self.images = 0
        self._file = path.open("xb")
        self._packed = gzip.GzipFile("", "wb", _GZIP_LEVEL, self._file, mtime=0)

    def write(self, line: dict[str, Any]) -> None:
        text = json.dumps(finite(line), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self._packed.write(text.encode("utf-8", "replace") + b"\n")
        self.images += 1

    def close(self) -> None:
        self._packed.close()
        self._file.close()


class BatchParts:
    """Takes line after line; a context manager, at whose end nothing is uploaded any more."""

    def __init__(
        self,
        directory: Path,
        left_off: BatchCheckpoint,
        put: Put,
        *,
        part_size: int,
        interrupt: Interrupt,
        on_checkpoint: Callable[[Checkpoint], None],
    ) -> None:
        """`directory` holds the parts that are not stored yet."""
        self._directory = directory
        self._kept = left_off
        #: Of all lines so far, stored or not.
        self.summary = left_off.summary.model_copy(deep=True)
        self._spent_before_s, self._start_s = left_off.summary.spent_s, time.monotonic()
        self._next_index, self._next_part = left_off.next_index, len(left_off.parts)
        self._put = put
        self._part_size = part_size
        self._interrupt = interrupt
        self._on_checkpoint = on_checkpoint
        self._file: _PartFile | None = None
        #: Ends an upload: with the batch, but not for a stop, in which there is still time for it.
        self._cut = interrupt.branch()
        self._uploader = ThreadPoolExecutor(1, "batch-upload")
        self._uploads: deque[Future[None]] = deque()

    def add(self, line: dict[str, Any]) -> None:
        """Write the next line, which `summary` counts already; waits while too many parts wait for storage.

        Raises what the upload of an earlier part met, and what the job's interrupt asks for.
        """
        if self._file is None:
            self._file = _PartFile(self._directory / _part_name(self._next_part))
        self._file.write(line)
        self._next_index += 1
        if self._file.images >= self._part_size:
            self._close_part()
        self._settle(_WAITING)

    def finish(self) -> BatchCheckpoint:
        """Close the last part and wait until all are stored; returns what there is of the whole batch."""
        self._close_part()
        self._settle(0)
        return self._kept

    def save(self) -> None:
        """Store what has been written, because the worker stops; what takes too long is lost."""
        self._close_part()
        concurrent.futures.wait(self._uploads, _SAVE_S)

    def _close_part(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self.summary.spent_s = round(self._spent_before_s + time.monotonic() - self._start_s, 3)
        summary = self.summary.model_copy(deep=True)
        upload = self._uploader.submit(
            self._store, self._next_part, self._file.images, self._next_index, summary
        )
        self._uploads.append(upload)
        self._file, self._next_part = None, self._next_part + 1

    def _settle(self, waiting: int) -> None:
        """Wait until at most so many parts wait for storage; raises what the upload of one met."""
        while self._uploads:
            if self._uploads[0].done():
                self._uploads.popleft().result()
            elif len(self._uploads) > waiting:
                concurrent.futures.wait(self._uploads, _LOOK_S, concurrent.futures.FIRST_COMPLETED)
                self._interrupt.check()
            else:
                return

    def _store(self, number: int, images: int, next_index: int, summary: BatchSummary) -> None:
        """Store a part, then the checkpoint that names it; in the uploader's thread."""
        if number != len(self._kept.parts):
            return  # the one before was not stored, and the batch ends with what that met
        stored = self._stored(_part_name(number))
        part = Part(path=stored.path, sha256=stored.sha256, images=images)
        kept = BatchCheckpoint(
            batch_sha256=self._kept.batch_sha256,
            next_index=next_index,
            parts=[*self._kept.parts, part],
            summary=summary,
        )
        # Each has a name of its own: the one that RVM-Server knows is never overwritten.
        name = f"checkpoint-{number:05d}.json"
        (self._directory / name).write_text(kept.model_dump_json(), encoding="utf-8")
        stored = self._stored(name)
        self._kept = kept
        self._on_checkpoint(Checkpoint(path=stored.path, sha256=stored.sha256, next_index=next_index))

    def _stored(self, name: str) -> Stored:
        path = self._directory / name
        stored = self._put(path, name, self._cut)
        path.unlink()
        return stored

    def __enter__(self) -> BatchParts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cut.request(StopReason.WORKER_STOPPED, "the batch has ended")
        self._uploader.shutdown(wait=False, cancel_futures=True)
        # One that hangs in its socket changes nothing any more.
        concurrent.futures.wait(self._uploads, 1.0)
        if self._file is not None:
            self._file.close()


def _part_name(number: int) -> str:
    return f"part-{number:05d}.jsonl.gz"
