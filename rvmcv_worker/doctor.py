"""`rvmcv-worker doctor`: is everything there that the worker needs? One line each, with what to do."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import ssl
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from rvmcv_worker import protocol, sandbox
from rvmcv_worker.config import (
    ConfigError,
    Credentials,
    Settings,
    load_credentials,
)
from rvmcv_worker.control_client import ControlClient, ControlError
from rvmcv_worker.controller import (
    Controller,
    ControllerError,
    ProtocolMissingError,
    TokenRejectedError,
)
from rvmcv_worker.gpu import Gpus
from rvmcv_worker.gpu_fault import job_bytes
from rvmcv_worker.jobs import JOB_TYPES
from rvmcv_worker.jobs.stub import Stub
from rvmcv_worker.logs import redact
from rvmcv_worker.protocol import WorkerState
from rvmcv_worker.storage import Storage
from rvmcv_worker.terminal import plain
from rvmcv_worker.token_source import TokenSource

_GB, _GIB = 1e9, 1024**3
#: Least NVIDIA driver by the CUDA major version that a torch wheel was built for.
_DRIVER_FOR_CUDA = {12: 525, 13: 580}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, what to do. `ok` is None where it is worth a look only."""

    subject: str
    ok: bool | None
    sentence: str


def examine(settings: Settings, console: Console) -> bool:
    """Print one line per finding; True when nothing stands in the way of running jobs."""
    marks = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("note", "yellow")}
    well = True
    for finding in findings(settings):
        mark, style = marks[finding.ok]
        line = Text.assemble((f"{mark:<7}", style), f"{finding.subject:<9}", plain(redact(finding.sentence)))
        console.print(line, soft_wrap=True, highlight=False)
        well = well and finding.ok is not False
    return well


def findings(settings: Settings) -> Iterator[Finding]:
    """Look at everything, in the order in which a job would need it."""
    try:
        credentials = load_credentials(settings)
    except ConfigError as error:
        yield Finding("token", False, str(error))
    else:
        yield from _ca_file(settings)
        # Under a name of its own: a second instance of the worker's would end what the daemon runs.
        worker = settings.worker.model_copy(update={"id": f"{settings.worker.id[:57]}-doctor"})
        stranger = settings.model_copy(update={"worker": worker})
        controller = Controller(stranger, TokenSource(settings), str(uuid.uuid4()))
        answers = list(_server(settings, controller))
        yield from answers
        if all(finding.ok for finding in answers) or credentials.s3_access_key:
            yield _storage(settings, credentials, controller)
        else:
            yield Finding("storage", None, "not looked at: it goes through RVM-Server")
    yield _jobs(settings)
    yield _wall(settings)
    yield _gpu(settings)
    yield _disk(settings)
    yield _compute(settings)
    yield _worker(settings)


def _ca_file(settings: Settings) -> Iterator[Finding]:
    """Find what is wrong with the private CA, which would else look like a fault of the server."""
    if (file := settings.server.ca_file) is None:
        return
    try:
        ssl.create_default_context(cafile=str(file))
    except ssl.SSLError:
        yield Finding("ca_file", False, f"{file} holds no certificate: it must be PEM (BEGIN CERTIFICATE)")
    except OSError as error:
        yield Finding("ca_file", False, f"{file}: {error.strerror}; correct [server] ca_file")
    else:
        yield Finding("ca_file", True, str(file))


def _server(settings: Settings, controller: Controller) -> Iterator[Finding]:
    url = settings.server.url
    try:
        controller.offer(
            "infer", slots=1, gpus_free=0, job_types=["doctor"], wait_s=0
        )  # a job type that nobody queues: nothing can be offered
    except TokenRejectedError as error:
        yield Finding("server", True, f"{url} answers")
        yield Finding(
            "token", False, f"{error}: ask RVM-Server's admin for a token with the ability `worker`"
        )
    except ProtocolMissingError as error:
        yield Finding("server", True, f"{url} answers")
        yield Finding("protocol", False, f"{error}: see docs/rvm-server.md, or correct [server] url")
    except ControllerError as error:
        yield Finding("server", False, f"{url}: {error}; check [server] url, the network and the firewall")
    else:
        yield Finding("server", True, f"{url} answers")
        yield Finding("token", True, "accepted")
        yield Finding("protocol", True, f"job-status answers, version {protocol.PROTOCOL_VERSION}")


def _storage(settings: Settings, credentials: Credentials, controller: Controller) -> Finding:
    ok, sentence = Storage(settings, credentials, controller).check()
    return Finding("storage", ok, sentence)


def _jobs(settings: Settings) -> Finding:
    """Tell what is claimed, and what could be: a job of a type that no worker asks for waits for ever."""
    claimed = settings.worker.job_types
    if unknown := sorted(set(claimed) - set(JOB_TYPES)):
        known = ", ".join(JOB_TYPES)
        return Finding(
            "jobs", False, f"no job type {unknown[0]!r}: correct [worker] job_types to some of {known}"
        )
    others = [name for name in JOB_TYPES if name not in {*claimed, Stub.name}]
    more = f"; not {', '.join(others)}, which [worker] job_types switches on" if others else ""
    return Finding("jobs", True, f"claims {', '.join(claimed)}{more}")


def _worker(settings: Settings) -> Finding:
    """Tell what the running worker says of itself: a unit of its own may keep it from what is well here."""
    try:
        status = ControlClient(settings.worker.runtime_dir).status()
    except ControlError as error:
        return Finding("worker", None, f"not looked at: {error}")
    if status["state"] == WorkerState.DEGRADED:
        return Finding("worker", None, f"runs, and is degraded: {'; '.join(status['reasons'])}")
    return Finding("worker", True, f"runs, and is {status['state']}")


def _wall(settings: Settings) -> Finding:
    try:
        wall = sandbox.choose(settings.sandbox, hide=settings.secret_dirs)
    except sandbox.SandboxUnavailableError as error:
        return Finding("wall", False, str(error))
    if wall.shortcoming:
        return Finding("wall", None, f'{wall.shortcoming} ([sandbox] mode = "auto")')
    return Finding("wall", True, f"{wall.name} works")


def _gpu(settings: Settings) -> Finding:
    gpus = Gpus(settings)
    if not gpus.expected:
        return Finding("gpu", None, f"none ({gpus.reason}); trainings run on the CPU")
    if not gpus.count:
        return Finding(
            "gpu", False, f"none ({gpus.reason}); for trainings on the CPU set [worker] gpu to none"
        )
    if faults := gpus.faults():
        return Finding("gpu", False, "; ".join(fault.sentence for fault in faults.values()))
    names = _gpu_names(gpus, settings)
    wheel = _cuda_of_torch()
    needed = _DRIVER_FOR_CUDA.get(wheel, 0)
    driver = int(match.group()) if (match := re.match(r"\d+", gpus.driver)) else 0
    if driver < needed:
        advice = (
            f"the torch wheel is built for CUDA {wheel} and wants driver {needed} or newer: apt install it"
        )
        return Finding("gpu", False, f"{names}, driver {gpus.driver}: {advice}")
    return Finding("gpu", True, f"{names}, driver {gpus.driver}, torch for CUDA {wheel or 'unknown'}")


def _gpu_names(gpus: Gpus, settings: Settings) -> str:
    """Return each GPU's name, what of its memory is free, and what a job may take of it."""
    told = []
    for index, reading in gpus.readings().items():
        gpu = gpus.identity(index)
        free = f"{reading.memory_free_bytes / _GIB:.1f}" if reading else "an unknown part"
        total_gb, job_gb = gpu.memory_total_bytes / _GIB, job_bytes(gpu, settings) / _GIB
        told.append(f"{gpu.name} ({free} of {total_gb:.1f} GB free, {job_gb:.1f} for a job)")
    return ", ".join(told)


def _cuda_of_torch() -> int:
    """Return the CUDA major version of the installed torch wheel, without importing it; 0 when unknown."""
    try:
        requires = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return 0
    for requirement in requires:
        if match := re.match(r"nvidia-[a-z-]+-cu(\d+)|cuda-toolkit.*==(\d+)", requirement):
            return int(match.group(1) or match.group(2))
    return 0


def _disk(settings: Settings) -> Finding:
    place = settings.worker.state_dir
    while not place.exists():
        place = place.parent
    free_gb = shutil.disk_usage(place).free / _GB
    floor_gb = settings.limits.disk_floor_gb
    if not place.is_dir():
        return Finding(
            "disk", False, f"{place} is no directory: move it away, or name another [worker] state_dir"
        )
    if not os.access(place, os.W_OK):
        return Finding("disk", False, f"{place} is not writable for this user: run as the worker's user")
    if free_gb < floor_gb:
        return Finding(
            "disk", False, f"{free_gb:.1f} GB free at {place}, [limits] disk_floor_gb is {floor_gb:g}"
        )
    return Finding("disk", True, f"{free_gb:.0f} GB free at {place}")


def _compute(settings: Settings) -> Finding:
    if set(settings.worker.job_types) <= {Stub.name}:
        return Finding("compute", None, "not looked at: no job type that is claimed computes anything")
    missing = []
    for package in ("torch", "torchvision", "ultralytics-opencv-headless", "sam2"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding("compute", False, f"{', '.join(missing)} missing: pip install 'rvmcv-worker[compute]'")
    return Finding("compute", True, f"torch {importlib.metadata.version('torch')}")
