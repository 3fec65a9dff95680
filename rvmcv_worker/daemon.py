"""The daemon: start, signals, stop. Everything else happens in the threads that it starts."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from functools import partial
from types import FrameType

from rvmcv_worker import (
    __version__,
    control,
    job_control,
    kernel,
    log_output,
    logs,
    recovery,
    sandbox,
    state_lock,
    systemd,
)
from rvmcv_worker.attempt import Services
from rvmcv_worker.config import ConfigError, Settings, load_credentials
from rvmcv_worker.controller import Controller
from rvmcv_worker.engine_client import Engines
from rvmcv_worker.engine_process import Machine
from rvmcv_worker.errands import Errands
from rvmcv_worker.events import Event, event
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.gpu import Gpus
from rvmcv_worker.health import HealthSocket
from rvmcv_worker.heartbeat import Heartbeat
from rvmcv_worker.housekeeping import Housekeeping
from rvmcv_worker.jobs import JOB_TYPES
from rvmcv_worker.lanes import LaneLoop
from rvmcv_worker.ledger import ClaimState, Ledger
from rvmcv_worker.log_output import LogFormat
from rvmcv_worker.machine_watch import MachineWatch, train_places
from rvmcv_worker.metrics import Metrics
from rvmcv_worker.metrics_file import MetricsFile
from rvmcv_worker.model_store import ModelStore
from rvmcv_worker.operator_wish import OperatorWish
from rvmcv_worker.outbox import Outbox
from rvmcv_worker.protocol import DesiredState
from rvmcv_worker.retry import Retry
from rvmcv_worker.sandbox import Sandbox
from rvmcv_worker.slots import Slots
from rvmcv_worker.spawner import Spawner
from rvmcv_worker.state import Condition, Lane
from rvmcv_worker.status_line import status_line
from rvmcv_worker.storage import Storage
from rvmcv_worker.tally import Tally
from rvmcv_worker.token_source import TokenSource
from rvmcv_worker.workspace import UsageMeter

#: Longest step of the main loop. It feeds systemd's watchdog, so it waits for no network, disk or lock: what
#: a signal asks of those is an errand.
_TICK_S = 1.0
#: A stop waits so long for a claim on its way, for running jobs to end, for their reports to be delivered.
_CLAIM_S, _STOP_S, _FLUSH_S = 5.0, 40.0, 10.0
#: All of them only enter a queue; README and docs/architecture.md say what each is for.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_GB = 1024**3


def _make_directories(settings: Settings) -> None:
    for directory in (settings.worker.state_dir, settings.work_dir, settings.model_store_dir):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"[worker] state_dir: {directory} cannot be made: {error.strerror}") from None


def make_services(settings: Settings) -> Services:
    """Put together what the daemon has one of; raises `ConfigError`."""
    credentials = load_credentials(settings)
    for secret in (credentials.token, credentials.s3_access_key, credentials.s3_secret_key):
        if secret is not None:
            logs.mask(secret.get_secret_value())
    tally = Tally(settings.worker.job_types)
    condition = Condition(tally)
    ledger = Ledger(settings.worker.state_dir / "ledger.sqlite3")
    token = TokenSource(settings)
    retry = Retry(settings, token)
    instance_id = str(uuid.uuid4())
    controller = Controller(settings, token, instance_id, tally)
    condition.on_hold = controller.let_go
    wall, spawner, gpus = _choose_wall(settings, condition), Spawner(), Gpus(settings)
    model_store = ModelStore(
        settings.model_store_dir,
        int(settings.limits.model_store_gb * _GB),
        pins=settings.models,
        walled=not isinstance(wall, sandbox.PlainProcess),
    )
    return Services(
        settings=settings,
        instance_id=instance_id,
        token=token,
        condition=condition,
        ledger=ledger,
        controller=controller,
        retry=retry,
        storage=Storage(settings, credentials, controller, retry, tally),
        model_store=model_store,
        sandbox=wall,
        spawner=spawner,
        outbox=Outbox(ledger, controller, retry, condition, settings.worker.state_dir / "rejected"),
        gpus=gpus,
        work_usage=UsageMeter(settings.work_dir),
        engines=Engines(Machine(settings, wall, spawner, gpus), model_store),
        tally=tally,
    )


def _choose_wall(settings: Settings, condition: Condition) -> Sandbox:
    """Return the wall; without the one required the worker stays up and says why it claims nothing."""
    try:
        wall = sandbox.choose(settings.sandbox, hide=settings.secret_dirs, work_dir=settings.work_dir)
    except sandbox.SandboxUnavailableError as error:
        condition.degrade("wall", f"no wall, no claims: {error}")
        event(Event.WALL_MISSING).error(
            "no wall, no claims: {}; rvmcv-worker doctor says when it is mended, then restart", error
        )
        return sandbox.MissingWall()
    if wall.shortcoming:
        condition.degrade("wall", wall.shortcoming, frozenset())
    return wall


def make_lanes(services: Services, train_slots: Slots) -> list[LaneLoop]:
    """Return the lanes that have a job type to run."""
    worker = services.settings.worker
    unknown = sorted(set(worker.job_types) - set(JOB_TYPES))
    if unknown:
        known = ", ".join(JOB_TYPES)
        raise ConfigError(f"[worker] job_types: no job type {unknown[0]!r}; this worker has {known}")
    job_types = {name: JOB_TYPES[name] for name in worker.job_types}
    slots = {
        Lane.TRAIN: train_slots,
        Lane.INFER: Slots([()] * worker.infer_slots),
        Lane.BATCH: Slots([()] * worker.batch_slots),
    }
    wanted = {job_type.lane for job_type in job_types.values()}
    return [LaneLoop(lane, job_types, slots[lane], services) for lane in Lane if lane in wanted]


def run(settings: Settings, log_format: LogFormat | None = None) -> ExitCode:
    """Run until SIGTERM or SIGINT; raises `ConfigError` or `AlreadyRunningError`."""
    output = log_output.configure(settings.worker.log_level, log_format or settings.worker.log_format)
    faulthandler.enable()  # the watchdog's SIGABRT tells where each thread hangs
    os.umask(0o077)
    kernel.hide_memory()
    _make_directories(settings)
    lock = state_lock.take(settings.worker.state_dir)
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def on_signal(signum: int, _frame: FrameType | None) -> None:
        signals.put(signum)

    threading.excepthook, sys.excepthook = _log_death, log_output.log_uncaught
    for signum in _SIGNALS:
        signal.signal(signum, on_signal)
    services = make_services(settings)
    services.job_logs.listen()
    train_slots = Slots(train_places(services.gpus, settings.worker.train_slots), services.gpus.unfit)
    lanes = make_lanes(services, train_slots)
    heartbeat = Heartbeat(services, frozenset(lane.lane for lane in lanes))
    wish = OperatorWish(settings.worker.state_dir, services.condition)
    metrics = Metrics(services, heartbeat, lanes)
    routes = control.routes(services, heartbeat, wish, metrics)
    health = HealthSocket(settings.worker.runtime_dir, routes, job_control.routes(services))
    event(Event.WORKER_STARTED).info(
        "rvmcv-worker {} as {}: {} for {}, wall: {}, GPUs: {}",
        __version__,
        settings.worker.id,
        settings.server.url,
        ", ".join(settings.worker.job_types),
        services.sandbox.name,
        services.gpus.count or f"none ({services.gpus.reason})",
    )
    wish.restore()
    health.start()
    watch = MachineWatch(services, train_slots)
    watch.look()
    chores = Housekeeping(services, output.tell_held_back)
    settlement = recovery.Settlement(services)
    file = settings.worker.metrics_file
    metrics_files = [MetricsFile(file, metrics.text)] if file else []
    errands, feeder = Errands(), systemd.Feeder()
    threads = (settlement, services.outbox, watch, heartbeat, chores, errands, *metrics_files, *lanes)
    for thread in threads:
        thread.start()
    feeder.feed(status_line(services.condition, settings.server.url), "READY=1")
    try:
        while not _stop_wanted(signals, services, wish, errands):
            if dead := [thread.name for thread in (health, *threads) if not thread.is_alive()]:
                event(Event.WORKER_DIED).critical(
                    "thread {} died: the worker stops, to be started anew; a line above says of what", dead[0]
                )
                return ExitCode.FAILED
            services.tick.beat()
            feeder.feed(status_line(services.condition, settings.server.url))
    finally:
        # systemd's watchdog ends here: TimeoutStopSec= bounds the stop.
        systemd.notify("STOPPING=1", "STATUS=stops: running jobs are handed back")
        chores.close()
        _stop(services, heartbeat, health, (settlement, *lanes))
        for metrics_file in metrics_files:
            metrics_file.close()
        os.close(lock)
    return ExitCode.OK


def _log_death(death: threading.ExceptHookArgs) -> None:
    """Log what a thread died of."""
    name = death.thread.name if death.thread else "unknown"
    event(Event.WORKER_DIED).opt(exception=death.exc_value).critical(
        "thread {} died of a fault of the worker's own: the worker stops, and systemd "
        "starts it anew; please report it with these lines",
        name,
    )


def _stop_wanted(
    signals: queue.SimpleQueue[int], services: Services, wish: OperatorWish, errands: Errands
) -> bool:
    """Wait one tick for a signal and do what it asks; True when that is to stop."""
    try:
        signum = signal.Signals(signals.get(timeout=_TICK_S))
    except queue.Empty:
        return False
    if signum == signal.SIGHUP:
        errands.do(partial(_reload, services))
    elif signum in {signal.SIGUSR1, signal.SIGUSR2}:
        errands.do(partial(_follow, wish, signum))
    else:
        event(Event.WORKER_STOPPING).info(
            "{}: running jobs are handed back, then the worker stops", signum.name
        )
        return True
    return False


def _reload(services: Services) -> None:
    reading = services.token.reload()
    event(Event.TOKEN_UNREADABLE if reading.fault else Event.TOKEN_RELOADED).log(
        "ERROR" if reading.fault else "INFO", "{}", reading
    )
    services.condition.wake()  # who waits with a rejected token tries this one at once


def _follow(wish: OperatorWish, signum: signal.Signals) -> None:
    with contextlib.suppress(OSError):  # it was followed, and the log says that it will be forgotten
        if signum == signal.SIGUSR1:
            wish.toggle_pause(by=signum.name)
        else:
            wish.set(DesiredState.DRAIN, by=signum.name)


def _stop(
    services: Services, heartbeat: Heartbeat, health: HealthSocket, claiming: Sequence[threading.Thread]
) -> None:
    """Hand back what runs and deliver what can be delivered, in bounded time.

    A claim on its way is waited for: what RVM-Server grants in this moment is handed back too.
    """
    condition = services.condition
    condition.stop("the worker was stopped")
    services.controller.abandon()
    deadline_s = time.monotonic() + _CLAIM_S
    for thread in claiming:
        thread.join(max(0.0, deadline_s - time.monotonic()))
        if thread.is_alive():
            event(Event.JOB_CLAIM_WAITS).warning(
                "{} still waits for RVM-Server: the next start settles its claim; nothing to do", thread.name
            )
    if not condition.wait_idle(_STOP_S):
        for job in condition.running():
            services.ledger.enter(
                job.job_id, ClaimState.STOPPED
            )  # the heartbeat goes on meanwhile: it keeps the leases
        event(Event.JOB_LEFT_BEHIND).warning(
            "{} jobs did not end in time; the next start hands them back, nothing to do",
            len(condition.running()),
        )
    services.engines.close()
    heartbeat.close()
    if not services.outbox.flush(_FLUSH_S):
        event(Event.REPORT_WAITS).warning(
            "final reports wait for the next start: RVM-Server does not take them now; nothing to do"
        )
    services.outbox.close()
    health.close()
    services.spawner.close()
    services.ledger.close()
    event(Event.WORKER_STOPPED).info("in order: rvmcv-worker has ended")
