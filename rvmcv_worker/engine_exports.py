"""Finds out, behind the engines' backs, what runs a model fastest here; until then torch answers.

Once for each model, device, image size and set of libraries, in a child that has this one model; how often
that is tried, `export_tries.py` says. What was found is kept beside the weights (`model_exports.py`), so a
restart does not measure again.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rvmcv_worker import model_exports, workspace
from rvmcv_worker.engine_process import EXPORT_SHARE, Machine
from rvmcv_worker.engine_wire import Trust
from rvmcv_worker.errors import JobError, ModelUnavailableError
from rvmcv_worker.events import Event, event
from rvmcv_worker.executor import ChildSpec, run_child
from rvmcv_worker.export_tries import ExportTries
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.logs import redact
from rvmcv_worker.model_exports import MAX_FILE_BYTES, Choice, Key, ModelExports
from rvmcv_worker.model_store import ModelStore
from rvmcv_worker.workspace import Workspace

#: The child's name, which is also its directory's.
_CHILD = "export"
#: Longest time for one model, on a GPU and on a CPU: TensorRT builds for minutes, and others wait meanwhile.
_GPU_TIMEOUT_S, _CPU_TIMEOUT_S = 3600.0, 1200.0
#: A stop waits so long for the child's end.
_CLOSE_S = 5.0
#: Candidates among which there is nothing to be found out.
_NOTHING_TO_CHOOSE = ("torch-cpu",)


class EngineExports:
    """Chosen backends by model; safe for several threads, with one of its own from the first question on."""

    def __init__(self, machine: Machine, store: ModelStore) -> None:
        self._machine = machine
        self._store = store
        self._exports = ModelExports(machine.settings.model_store_dir)
        self._versions = model_exports.library_versions()
        self._cpu = model_exports.cpu_name()
        self._lock = threading.Lock()
        #: By the names of their keys.
        self._known: dict[str, Choice] = {}
        self._tries = ExportTries()
        #: Approved models before all others, then by number; None says that nothing more is measured.
        self._wanted: queue.PriorityQueue[tuple[int, int, tuple[Key, int | None] | None]]
        self._wanted = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._interrupt = Interrupt()
        self._thread: threading.Thread | None = None

    def key(self, model_sha256: str, imgsz: int | None, gpu: int | None) -> Key:
        """Return what a choice for this model holds for, on a GPU or on the CPU."""
        setting = self._machine.settings.inference.backend
        return Key(
            model_sha256=model_sha256,
            device=self._cpu if gpu is None else self._machine.gpus.identity(gpu).name,
            imgsz=imgsz,
            candidates=model_exports.candidates(setting, "cpu" if gpu is None else "0"),
            versions=self._versions,
        )

    def find(self, key: Key, gpu: int | None, trust: Trust) -> Choice | None:
        """Return what was chosen; None while that is not known, and then it is being found out."""
        if key.candidates == _NOTHING_TO_CHOOSE:
            return None
        name = key.directory_name
        with self._lock:
            if choice := self._known.get(name) or self._exports.find(key):
                self._known[name] = choice
                return choice
            approved = trust is Trust.APPROVED
            if self._tries.begin(key, time.monotonic(), approved=approved):
                self._wanted.put((0 if approved else 1, next(self._numbers), (key, gpu)))
                self._begin()
        return None

    def place(self, key: Key, choice: Choice, into: Path) -> None:
        """Copy a choice's files into a new directory; raises `ModelUnavailableError` when they are gone."""
        try:
            self._exports.place(key, choice, into)
        except ModelUnavailableError as error:
            self.distrust(key, error)
            raise

    def distrust(self, key: Key, error: Exception) -> None:
        """Forget a choice that does not do: torch goes on, and it is measured again later."""
        with self._lock:
            self._known.pop(key.directory_name, None)
            self._exports.forget(key)
            self._tries.fail(key, error, time.monotonic())

    def close(self) -> None:
        """Measure nothing more."""
        self._interrupt.request(StopReason.WORKER_STOPPED, "the worker was stopped")
        self._wanted.put((-1, next(self._numbers), None))
        if self._thread:
            self._thread.join(_CLOSE_S)
        self._interrupt.close()

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine-exports", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (wanted := self._wanted.get()[2]) and not self._interrupt.reason:
            key, gpu = wanted
            try:
                choice = self._measure(key, gpu)
            except Exception as error:  # noqa: BLE001 - without this thread nothing is ever measured
                with self._lock:
                    self._tries.fail(key, error, time.monotonic())
                if not self._interrupt.reason:
                    _tell_failure(key, error)
            else:
                times = (f"{name} {figures.get('ms', '?')} ms" for name, figures in choice.measured.items())
                event(Event.ENGINE_BACKEND_CHOSEN).info(
                    "model {} runs by {} ({}) from now on; measured: {}",
                    key.model_sha256,
                    choice.chosen.backend,
                    choice.chosen.precision,
                    ", ".join(times),
                )

    def _measure(self, key: Key, gpu: int | None) -> Choice:
        machine = self._machine
        with _own_workspace(machine) as place:
            self._store.place(key.model_sha256, place.in_dir / "model.pt")
            spec = ChildSpec(
                name=_CHILD,
                job={
                    "task": "export_model",
                    "model": "in/model.pt",
                    "imgsz": key.imgsz,
                    "device": "cpu" if gpu is None else "0",
                    "candidates": list(key.candidates),
                },
                timeout_s=_CPU_TIMEOUT_S if gpu is None else _GPU_TIMEOUT_S,
                gpus=machine.device_numbers(gpu),
                gpu_memory_fraction=machine.gpu_memory_fraction(gpu, EXPORT_SHARE),
            )
            end = run_child(
                spec,
                workspace=place,
                sandbox=machine.sandbox,
                spawner=machine.spawner,
                limits=machine.limits,
                interrupt=self._interrupt,
                on_progress=lambda _said: None,
                term_grace_s=0.0,  # there is nothing to save
            )
            choice = Choice.parse(end.result)
            self._exports.save(
                key, choice, lambda file: place.read_back(_CHILD, file.name, max_bytes=MAX_FILE_BYTES)
            )
        with self._lock:
            self._known[key.directory_name] = choice
            self._tries.end(key)
        return choice


def _tell_failure(key: Key, error: Exception) -> None:
    if isinstance(error, (JobError, OSError)):  # the latter of a full disk
        why = f"{error.code}: {error.message}" if isinstance(error, JobError) else str(error)
        event(Event.ENGINE_BACKEND_DROPPED).warning(
            "model {}: goes on with torch: {}; nothing to do", key.model_sha256, redact(why)
        )
    else:
        event(Event.WORKER_FAULT).opt(exception=error).error(
            "a fault of the worker's own while a model was measured: torch goes on; please "
            "report it with these lines"
        )


@contextlib.contextmanager
def _own_workspace(machine: Machine) -> Iterator[Workspace]:
    place = workspace.make_own(machine.settings.work_dir, "export")
    try:
        yield place
    finally:
        workspace.wipe(place.root)
