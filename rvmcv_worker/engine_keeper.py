"""Keeps one engine: starts it when it is asked, replaces it when it fails, stops it when it is idle.

A thread of its own does all of it, so that nothing here needs a lock but its inbox. After a crash, a
broken stream or a request over its time, what was under way is repeated in a fresh engine, one at a
time: only what fails alone has failed.
"""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import threading
import time

from rvmcv_worker import engine_answer
from rvmcv_worker.engine_answer import AnswerError, Ready, Said
from rvmcv_worker.engine_pending import InferResult, Pending, RefusedModels
from rvmcv_worker.engine_process import EngineFaultError, EngineProcess, Machine
from rvmcv_worker.engine_wire import Stage, Trust
from rvmcv_worker.errors import (
    InternalError,
    JobError,
    TimedOutError,
    WorkerStoppedError,
    WorkerUnfitError,
    from_code,
)
from rvmcv_worker.events import Event, event
from rvmcv_worker.logs import redact
from rvmcv_worker.protocol import EngineStatus
from rvmcv_worker.workspace import Workspace

#: How often a running engine's memory and the clocks of its requests are looked at, in seconds.
_TICK_S = 1.0
#: A stop waits so long for an engine's end; then it ends with the thread that started it.
_CLOSE_S = 5.0
#: Most frames about one request; an engine that says more is no engine.
_MOST_FRAMES = 32


class EngineKeeper(threading.Thread):
    """One trust class's engine."""

    def __init__(self, trust: Trust, machine: Machine, place: Workspace) -> None:
        super().__init__(name=f"engine-{trust.value}", daemon=True)
        #: The libraries and device of the engine that was ready last; None until one was.
        self.ready: Ready | None = None
        self._answered = 0
        self._replaced = 0
        self._trust = trust
        self._machine = machine
        self._settings = machine.settings.inference
        self._place = place
        self._inbox: collections.deque[Pending] = collections.deque()
        self._closing = threading.Event()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._woken)
        self._engine: EngineProcess | None = None
        self._is_ready = False
        self._waiting: collections.deque[Pending] = collections.deque()
        #: What was under way when an engine failed: each is repeated alone.
        self._suspects: collections.deque[Pending] = collections.deque()
        self._in_flight: dict[int, Pending] = {}
        self._alone: Pending | None = None
        #: A stranger's; approved ones are tried each time, for the machine's own troubles pass.
        self._refused = RefusedModels()
        self._heard_s = 0.0
        self._idle_since_s = 0.0
        self._next_tick_s = 0.0

    def submit(self, pending: Pending) -> None:
        """Have a request answered; its future is told."""
        self._inbox.append(pending)
        os.eventfd_write(self._wake_fd, 1)

    def device(self) -> int | None:
        """Return the GPU that the engine has, or would get if it were started now; None for the CPU."""
        engine = self._engine
        return engine.gpu if engine else self._machine.choose_gpu()

    def status(self) -> EngineStatus:
        """Return how the engine is at this moment; for any thread."""
        engine, in_flight = self._engine, len(self._in_flight) + len(self._waiting) + len(self._suspects)
        state = "stopped"
        if engine:
            state = "starting" if not self._is_ready else "busy" if in_flight else "idle"
        return EngineStatus(
            trust=self._trust.value,
            state=state,
            device=self.ready.device if engine and self.ready else None,
            in_flight=in_flight,
            answered=self._answered,
            replaced=self._replaced,
            memory_mb=engine.memory_bytes // 1024**2 if engine else 0,
        )

    def close(self) -> None:
        """End the engine; what is under way fails as `worker_stopped`."""
        self._closing.set()
        os.eventfd_write(self._wake_fd, 1)
        if self.is_alive():
            self.join(_CLOSE_S)
        if not self.is_alive():
            self._selector.close()
            os.close(self._wake_fd)

    def run(self) -> None:
        """Serve until `close`."""
        while not self._closing.is_set():
            try:
                self._step_or_replace()
            except Exception as error:  # noqa: BLE001 - without this thread nothing is ever answered
                event(Event.WORKER_FAULT).exception(
                    "a fault of the worker's own with the {} engine: it is started anew; please "
                    "report it with these lines",
                    self._trust.value,
                )
                with contextlib.suppress(JobError):  # one that cannot be killed is left to its fate
                    self._end()
                self._fail_all(InternalError(f"{type(error).__name__} while an engine was asked: {error}"))
        with contextlib.suppress(JobError):
            self._end()
        self._take_in()
        self._fail_all(WorkerStoppedError("the worker was stopped"))

    # -- the thread's own ------------------------------------------------------------------------

    def _step_or_replace(self) -> None:
        try:
            self._step()
        except EngineFaultError as fault:
            self._replace(fault)

    def _step(self) -> None:
        self._take_in()
        self._send()
        for key, _ in self._selector.select(_TICK_S if self._engine else None):
            key.data()
        if self._engine:
            self._look_at_clocks(self._engine)

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _take_in(self) -> None:
        while self._inbox:
            pending = self._inbox.popleft()
            if error := self._refused.error(pending):
                pending.fail(error)
            else:
                self._waiting.append(pending)

    def _send(self) -> None:
        """Start an engine if one is needed, and send what may be sent now."""
        if not (self._waiting or self._suspects):
            return
        if self._engine is None:
            self._start()
        if self._engine is None or not self._is_ready or self._alone:
            return
        if self._suspects:
            while self._suspects and not self._in_flight:
                self._alone = self._suspects.popleft()
                self._send_one(self._engine, self._alone)
            return
        while self._waiting:
            self._send_one(self._engine, self._waiting.popleft())

    def _send_one(self, engine: EngineProcess, pending: Pending) -> None:
        future = pending.future
        if future.running() or future.set_running_or_notify_cancel():
            if not pending.abandoned:
                if not self._in_flight:
                    self._heard_s = time.monotonic()  # until now there was nothing to be said
                pending.stage, pending.frames = None, 0
                self._in_flight[pending.request.id] = pending
                engine.send(pending.request_on(engine.gpu), pending.image)
                return
            future.set_exception(WorkerStoppedError("its job has ended meanwhile"))
        if pending is self._alone:
            self._alone = None

    def _start(self) -> None:
        self._is_ready = False
        try:
            self._engine = EngineProcess(self._machine, self._place)
        except (JobError, OSError) as error:  # the latter of a full disk, or of no more processes
            self._fail_all_unfit(f"cannot be started: {error}")
            return
        self._heard_s = self._idle_since_s = time.monotonic()
        self._next_tick_s = self._heard_s + _TICK_S
        self._engine.watch(self._selector, self._hear)
        event(Event.ENGINE_STARTED).info(
            "the {} engine starts, on {}", self._trust.value, self._engine.device
        )

    def _hear(self) -> None:
        engine = self._engine
        if engine is None:
            return
        try:
            for header, payload in engine.frames():
                self._heard_s = time.monotonic()
                if self._is_ready:
                    self._take_said(engine_answer.read_said(header), payload)
                else:
                    self._take_ready(engine_answer.read_ready(header))
        except AnswerError as error:
            raise engine.fault(str(error)) from None

    def _take_ready(self, ready: Ready) -> None:
        self._is_ready = True
        self.ready = ready

    def _take_said(self, said: Said, payload: bytes) -> None:
        pending = self._in_flight.get(said.id)
        if pending is None:
            raise AnswerError(f"spoke of a request {said.id} that it does not have")
        pending.frames += 1
        if pending.frames > _MOST_FRAMES:
            raise AnswerError(f"said more than {_MOST_FRAMES} things about one request")
        if said.stage:
            pending.stage, pending.stage_since_s = said.stage, self._heard_s
            return
        if said.ok:
            result, picture = engine_answer.read_result(payload, said.picture_bytes, pending.request.options)
            self._forget(pending)
            self._answered += 1
            pending.future.set_result(InferResult(result, picture))
        else:
            error = said.to_error()
            self._forget(pending)
            pending.future.set_exception(error)

    def _forget(self, pending: Pending) -> None:
        del self._in_flight[pending.request.id]
        if pending is self._alone:
            self._alone = None
        if not self._in_flight:
            self._idle_since_s = time.monotonic()

    def _look_at_clocks(self, engine: EngineProcess) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + _TICK_S
            engine.check()
        if not self._is_ready:
            self._check_silence(now_s, self._settings.load_timeout_s, "did not get ready")
        elif not self._in_flight:
            if not self._waiting and now_s - self._idle_since_s > self._settings.engine_idle_s:
                event(Event.ENGINE_STOPPED).info(
                    "the {} engine had nothing to do: it is stopped", self._trust.value
                )
                self._end()
        else:
            self._check_requests(now_s)

    def _check_requests(self, now_s: float) -> None:
        """Raise when a request is over its stage's time; those that only wait have all the time they need."""
        limits_s = {Stage.LOAD: self._settings.load_timeout_s, Stage.INFER: self._settings.infer_timeout_s}
        under_way = [pending for pending in self._in_flight.values() if pending.stage in limits_s]
        for pending in under_way:
            limit_s = limits_s[pending.stage] if pending.stage else 0.0
            if now_s - pending.stage_since_s > limit_s:
                what = "its models" if pending.stage is Stage.LOAD else "the image"
                raise EngineFaultError(
                    TimedOutError(f"the inference engine took more than {limit_s:g} s for {what}")
                )
        if not under_way:  # an image is decoded, or nothing at all is done
            self._check_silence(now_s, self._settings.infer_timeout_s, "was silent")

    def _check_silence(self, now_s: float, limit_s: float, what: str) -> None:
        if now_s - self._heard_s > limit_s:
            raise EngineFaultError(TimedOutError(f"the inference engine {what} for {limit_s:g} s"))

    def _replace(self, fault: EngineFaultError) -> None:
        """End an engine that failed; the next step starts another one for what was under way."""
        event(Event.ENGINE_REPLACED).warning(
            "the {} engine is replaced: {}; its images are asked again, nothing to do unless this goes on",
            self._trust.value,
            redact(str(fault)),
        )
        was_ready, gpu_lost = self._is_ready, fault.error.code == "worker_unfit"
        self._end()
        self._replaced += 1
        under_way = list(self._in_flight.values())
        self._in_flight.clear()
        if self._alone and not gpu_lost:
            alone, self._alone = self._alone, None
            if alone.stage is Stage.LOAD and self._trust is Trust.OTHER:
                self._refused.add(alone, fault.error)
            alone.future.set_exception(fault.error)
        elif not was_ready:
            self._alone = None
            self._fail_all_unfit(f"did not get ready: {fault.error.message}")
        else:
            self._alone = None
            # Those that only waited are hardly at fault: they go first.
            under_way.sort(key=lambda pending: pending.stage in {Stage.LOAD, Stage.INFER})
            self._suspects.extend(under_way)

    def _end(self) -> None:
        try:
            if self._engine:
                self._engine.end()
        finally:  # only now: who reads the status takes "stopped" for no process left
            self._engine = None
            self._is_ready = False

    def _fail_all_unfit(self, what: str) -> None:
        """Hand back whatever waits: until it is ready an engine has seen nothing of any job."""
        event(Event.ENGINE_FAILED).error(
            "the {} engine {}; what waited for it is handed back, see what `rvmcv-worker doctor` says",
            self._trust.value,
            redact(what),
        )
        self._fail_all(WorkerUnfitError(f"the inference engine {what}"))

    def _fail_all(self, error: JobError) -> None:
        """Fail whatever is under way or waits, each with an error of its own."""
        waiting = [*self._in_flight.values(), *self._suspects, *self._waiting]
        self._in_flight.clear()
        self._suspects.clear()
        self._waiting.clear()
        self._alone = None
        for pending in waiting:
            pending.fail(from_code(error.code, error.message))
