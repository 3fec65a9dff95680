"""The engine: a child that stays, with its models warm, and answers requests (`engine_wire.py`).

Three threads share the work: one reads the stream, one decodes images, one has the models. The main thread
only waits for the end, so that neither a long computation nor a hung one keeps SIGTERM waiting.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from rvmcv_worker import framing
from rvmcv_worker.compute import engine_faults, image_decode, ultralytics_env
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.engine_queue import Decoded, Encoded, EngineQueue
from rvmcv_worker.compute.model_cache import ModelCache
from rvmcv_worker.engine_wire import Request, Stage
from rvmcv_worker.errors import JobError

_CHUNK_BYTES = 1024 * 1024
#: Largest encoded image; the daemon has bounds of its own.
_MAX_IMAGE_BYTES = 1024**3
#: Decoded images of each queue that may wait on a CPU, where they are computed one by one.
_AHEAD = 2
#: Longest message of an error, in characters: a hostile checkpoint words its own.
_MAX_MESSAGE = 2000


def run(job: dict[str, Any], child: Child) -> NoReturn:
    """Answer requests until SIGTERM or the end of the stream; does not return."""
    engine = Engine(job, child)
    engine.start()
    child.stop_requested.wait()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the interpreter's own end, which may wait for native code of the other threads, or trip over it.
    os._exit(engine.exit_status)


class Engine:
    """The three threads, and the queue between them."""

    def __init__(self, job: dict[str, Any], child: Child) -> None:
        self._job = job
        self._child = child
        self._max_pixels = int(job["max_pixels"])
        self._device = str(job["device"])
        on_gpu = self._device != "cpu"
        # On a CPU a batch gains nothing.
        max_batch = int(job["max_batch"]) if on_gpu else 1
        self._queue = EngineQueue(
            ahead=max(_AHEAD, max_batch), max_batch=max_batch, window_s=float(job["batch_window_ms"]) / 1000
        )
        self._on_gpu = on_gpu
        self._write_lock = threading.Lock()
        #: 1 when a thread has failed.
        self.exit_status = 0

    def start(self) -> None:
        """Start the threads; the end of any of them is the engine's."""
        for work in (self._read, self._decode, self._compute):
            threading.Thread(target=self._until_end, args=(work,), name=work.__name__, daemon=True).start()

    def _until_end(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (BrokenPipeError, ConnectionResetError):  # the daemon is gone
            pass
        except Exception:  # noqa: BLE001 - told in the log; the daemon sees the end, and replaces the engine
            traceback.print_exc()
            self.exit_status = 1
        finally:
            self._child.stop_requested.set()

    def _read(self) -> None:
        decoder = framing.Decoder(max_payload_bytes=_MAX_IMAGE_BYTES, max_per_s=None)
        while data := os.read(self._child.progress_fd, _CHUNK_BYTES):
            for header, content in decoder.feed(data, time.monotonic()):
                self._queue.put(Request.from_header(header), content)

    def _decode(self) -> None:
        while True:
            encoded = self._queue.take_encoded()
            self._tell(encoded.request.id, Stage.DECODE)
            try:
                decoded = self._decoded(encoded)
            except Exception as error:  # noqa: BLE001 - a fault of this request, not of the engine
                decoded = None
                self._answer_error(encoded.request, engine_faults.explain(error, self._child.root))
            self._queue.put_decoded(decoded)

    def _decoded(self, encoded: Encoded) -> Decoded:
        clock = self._queue.clock
        started_s = clock()
        image = image_decode.decode(encoded.content, self._max_pixels)
        key = hashlib.sha256(encoded.content).hexdigest()
        ready_s = clock()
        return Decoded(
            request=encoded.request,
            image=image,
            image_key=key,
            queued_s=started_s - encoded.arrived_s,
            decode_s=ready_s - started_s,
            ready_s=ready_s,
        )

    def _compute(self) -> None:
        ultralytics_env.isolate(self._child.directory)
        # Only now: these import torch and Ultralytics, which takes seconds.
        from rvmcv_worker.compute import inference, runtime
        from rvmcv_worker.compute.embedding_cache import EmbeddingCache

        ultralytics_env.require_safe_load()
        models = inference.Inference(
            self._child.root,
            device=self._device,
            models=ModelCache(int(self._job["memory_bytes"])),
            embeddings=EmbeddingCache(int(self._job["embedding_cache_bytes"])),
            tell=self._tell,
        )
        versions = {name: text for name, text in runtime.versions(self._on_gpu).items() if text}
        self._send({"ready": True, "device": self._device, "versions": versions})
        while True:
            for request, answer in models.serve(self._queue.take_batch(models.group)):
                if isinstance(answer, JobError):
                    self._answer_error(request, answer)
                else:
                    header = {"id": request.id, "ok": True, "picture_bytes": len(answer.picture)}
                    self._send(header, answer.result + answer.picture)

    def _tell(self, request_id: int, stage: Stage) -> None:
        self._send({"id": request_id, "stage": stage.value})

    def _answer_error(self, request: Request, error: JobError) -> None:
        told = {"code": error.code, "message": error.message[:_MAX_MESSAGE]}
        self._send({"id": request.id, "ok": False, "error": told})

    def _send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        with self._write_lock:
            framing.write(self._child.progress_fd, header, payload)
