"""The engines as the daemon's other parts use them: ask about an image, get its result.

One engine process for each trust class, started when it is first asked and stopped when it has been idle.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path

from rvmcv_worker import workspace
from rvmcv_worker.engine_exports import EngineExports
from rvmcv_worker.engine_files import EngineFiles
from rvmcv_worker.engine_keeper import EngineKeeper
from rvmcv_worker.engine_pending import InferResult, Pending
from rvmcv_worker.engine_process import Machine
from rvmcv_worker.engine_wire import Backend, Model, Options, Queue, Request, Segmenter, Stage, Trust
from rvmcv_worker.errors import (
    JobCrashedError,
    ModelUnavailableError,
    OutOfMemoryError,
    TimedOutError,
    WorkerStoppedError,
)
from rvmcv_worker.events import Event, event
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.model_exports import Key
from rvmcv_worker.model_store import ModelStore
from rvmcv_worker.protocol import EngineStatus

__all__ = ["Ask", "Engines", "InferResult"]

_GB = 1024**3
#: Seconds between two looks at whether a job that waits for an answer shall end.
_INTERRUPT_S = 0.25
_STOPPED = "the worker was stopped"
#: What a request names until it is known which device its engine has.
_TORCH = Backend("torch-cpu", "fp32")


@dataclass(frozen=True)
class Ask:
    """What is asked about an image; both models are in the store, by sha256."""

    trust: Trust
    queue: Queue
    model_sha256: str
    options: Options
    #: A SAM2 for the masks; None for none, or for the detector's own (`options.segmentation`).
    segmenter_sha256: str | None = None


class Engines:
    """Both engines; safe for several threads."""

    def __init__(self, machine: Machine, store: ModelStore) -> None:
        self.store = store
        self._ids = itertools.count(1)
        self._max_batch = machine.settings.inference.max_batch
        self._exports = EngineExports(machine, store)
        self._engines = {trust: _Engine(trust, machine, store, self._exports) for trust in Trust}

    def infer(self, ask: Ask, image: bytes, *, interrupt: Interrupt) -> InferResult:
        """Return the answer, when it has come; raises `JobError`, or what the job's `interrupt` asks for."""
        pending = self._submit(ask, image)
        while True:
            try:
                return pending.future.result(_INTERRUPT_S)
            except FutureTimeoutError:
                if interrupt.reason:
                    pending.abandon()
                    interrupt.check()

    def submit(self, ask: Ask, image: bytes) -> Future[InferResult]:
        """Ask and return at once, but for the copying of a model that the engine does not have yet.

        The future raises `JobError`. Cancelled, its answer is dropped when it comes. How many are asked at
        once is the caller's to bound: each holds its image in memory.
        """
        return self._submit(ask, image).future

    def at_once(self, trust: Trust) -> int:
        """Return how many requests keep an engine busy: two of its batches, on a CPU two images.

        It speaks of the device that the engine has, or would get if it were started now.
        """
        return 2 if self._engines[trust].keeper.device() is None else 2 * self._max_batch

    def status(self) -> list[EngineStatus]:
        """Return how each engine that was ever asked is."""
        engines = self._engines.values()
        return [engine.keeper.status() for engine in engines if engine.keeper.is_alive()]

    def drop_unused(self) -> None:
        """Remove the engines' copies of models that no request needs now."""
        for engine in self._engines.values():
            engine.drop_unused()

    def close(self) -> None:
        """End both; what is under way fails as `worker_stopped`."""
        for engine in self._engines.values():
            engine.close()
        self._exports.close()

    def _submit(self, ask: Ask, image: bytes) -> Pending:
        return self._engines[ask.trust].submit(next(self._ids), ask, image)


class _Engine:
    """One trust class's keeper, and the files of its engine."""

    def __init__(self, trust: Trust, machine: Machine, store: ModelStore, exports: EngineExports) -> None:
        settings = machine.settings
        self._name = f"engine-{trust.value}"
        self._trust = trust
        self._work_dir = settings.work_dir
        self._place = workspace.own(settings.work_dir, self._name)
        self._store = store
        self._exports = exports
        self._files = EngineFiles(self._place.in_dir, int(settings.inference.engine_memory_gb * _GB))
        self._lock = threading.Lock()
        self._closed = False
        self.keeper = EngineKeeper(trust, machine, self._place)

    def submit(self, request_id: int, ask: Ask, image: bytes) -> Pending:
        self._begin()
        with contextlib.ExitStack() as taken:
            model = Model(ask.model_sha256, self._take_model(ask.model_sha256, taken), _TORCH)
            segmenter = None
            if ask.segmenter_sha256:
                segmenter = Segmenter(ask.segmenter_sha256, self._take_model(ask.segmenter_sha256, taken))
            gpu = self.keeper.device()
            request = Request(request_id, ask.queue, model, ask.options, segmenter)
            key = self._exports.key(ask.model_sha256, ask.options.imgsz, gpu)
            pending = Pending(request, image, measured=self._take_export(key, gpu, taken), measured_on=gpu)
            release = taken.pop_all()
        pending.future.add_done_callback(lambda _: release.close())
        pending.future.add_done_callback(lambda _: self._judge_export(key, pending))
        with self._lock:
            if self._closed:
                pending.future.cancel()
                raise WorkerStoppedError(_STOPPED)
            self.keeper.submit(pending)
        return pending

    def _take_model(self, sha256: str, taken: contextlib.ExitStack) -> str:
        return self._take(f"models/{sha256}.pt", lambda path: self._store.place(sha256, path), taken)

    def _judge_export(self, key: Key, pending: Pending) -> None:
        """Trust an export no more whose loading ended an engine in which nothing else was under way."""
        exported = pending.measured is not None and pending.measured.path is not None
        if exported and pending.stage is Stage.LOAD and not pending.future.cancelled():
            error = pending.future.exception()
            if isinstance(error, (JobCrashedError, OutOfMemoryError, TimedOutError)):
                event(Event.ENGINE_BACKEND_DROPPED).warning(
                    "{}: torch goes on, after {}; nothing to do", key.directory_name, error.code
                )
                self._exports.distrust(key, error)

    def _take_export(self, key: Key, gpu: int | None, taken: contextlib.ExitStack) -> Backend | None:
        """Return what was found to run the model fastest, its files at the engine's hand."""
        choice = self._exports.find(key, gpu, self._trust)
        if choice is None:
            return None
        path = None
        if choice.files:
            try:
                directory = self._take(
                    f"exports/{key.directory_name}",
                    lambda into: self._exports.place(key, choice, into),
                    taken,
                )
            except ModelUnavailableError as error:
                event(Event.ENGINE_BACKEND_DROPPED).warning("{}; torch goes on, nothing to do", error.message)
                return None
            path = f"{directory}/{choice.files[0].name}"
        return Backend(choice.chosen.backend, choice.chosen.precision, path)

    def _take(self, name: str, place: Callable[[Path], None], taken: contextlib.ExitStack) -> str:
        path = self._files.take(name, place)
        taken.callback(self._files.give_back, name)
        return path

    def drop_unused(self) -> None:
        self._files.drop_unused()

    def _begin(self) -> None:
        """Make the directories and start the thread, once, when the first request comes."""
        with self._lock:
            if self._closed:
                raise WorkerStoppedError(_STOPPED)
            if self.keeper.is_alive():
                return
            workspace.make_own(self._work_dir, self._name)
            self.keeper.start()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.keeper.close()
        workspace.wipe(self._place.root)
