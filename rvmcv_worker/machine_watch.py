"""Whether the machine is fit to take jobs: room on the disk, GPUs that work. Looked at once a second."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Literal

from rvmcv_worker.attempt import Services
from rvmcv_worker.disk_room import DiskLook
from rvmcv_worker.events import Event, event
from rvmcv_worker.gpu import Gpus
from rvmcv_worker.gpu_fault import FaultKind
from rvmcv_worker.slots import Slots
from rvmcv_worker.state import Lane

_LOOK_S, _LOOK_LEAST_S = 1.0, 0.05
#: Seconds between two looks at what the model store holds.
_STORE_LOOK_S = 10.0
_GB = 1e9
#: What ends by itself, or with the program that has the memory.
_PASSES = {kind.value for kind in (FaultKind.XID, FaultKind.HOT, FaultKind.FULL)}
_DISK = "disk"  #: the source of what is said of the disk
_ALL, _TRAIN, _NONE = frozenset(Lane), frozenset({Lane.TRAIN}), frozenset[Lane]()


def train_places(gpus: Gpus, wanted: int | Literal["per-gpu"]) -> list[tuple[int, ...]]:
    """Return the places of the train lane: none while GPUs are expected and none has been seen."""
    if gpus.expected:
        one_each: list[tuple[int, ...]] = [(index,) for index in range(gpus.count)]
    else:
        one_each = [()]
    if wanted == "per-gpu" or not one_each:
        return one_each
    return [one_each[number % len(one_each)] for number in range(wanted)]


class MachineWatch(threading.Thread):
    """One thread for the daemon's life; `train_slots` get places for GPUs that come late."""

    def __init__(self, services: Services, train_slots: Slots) -> None:
        super().__init__(name="machine-watch", daemon=True)
        self._services = services
        self._train_slots = train_slots
        self._gpus_placed = train_slots.gpus
        self._faults: dict[str, tuple[str, frozenset[Lane]]] = {}
        self._store_bytes: int | None = None
        self._store_due_s = 0.0

    def run(self) -> None:
        """Look, and tell what has changed."""
        pause_s = max(_LOOK_LEAST_S, self._services.settings.scaled(_LOOK_S))
        while not self._services.condition.stopping.wait(pause_s):
            try:
                self.look()
            except Exception:  # noqa: BLE001 - the machine is looked at again; jobs go on meanwhile
                event(Event.WORKER_FAULT).exception(
                    "a fault of the worker's own in the watch over the machine: it goes on; please "
                    "report it with these lines"
                )

    def look(self) -> None:
        """Look once."""
        self._look_at_disk()
        self._look_at_gpus()

    def _look_at_disk(self) -> None:
        settings = self._services.settings
        limits, directory = settings.limits, settings.work_dir
        try:
            found = os.statvfs(directory)
        except OSError as error:
            self._services.disk_room.note(DiskLook())
            self._ill(_DISK, "unreadable", f"{directory}: {error.strerror}: nothing is claimed", _ALL)
            return
        free_bytes = found.f_bavail * found.f_frsize
        held_bytes = self._services.work_usage.read().bytes
        self._services.disk_room.note(DiskLook(free_bytes, held_bytes, self._model_store_bytes()))
        free_gb, held_gb = free_bytes / _GB, held_bytes / _GB
        high_gb = limits.workspace_high_water * limits.max_workspace_gb
        if free_gb < limits.disk_floor_gb:
            kind, reason = (
                "floor",
                (
                    f"{free_gb:.3g} GB are free on the disk of {directory}, below [limits] disk_floor_gb = "
                    f"{limits.disk_floor_gb:g}"
                ),
            )
        elif found.f_files and found.f_favail < limits.disk_floor_files:
            kind, reason = (
                "files",
                (
                    f"{found.f_favail} inodes are free on the disk of {directory}, below [limits] "
                    f"disk_floor_files = {limits.disk_floor_files}"
                ),
            )
        elif held_gb > high_gb:
            kind, reason = (
                "high water",
                (
                    f"the running jobs' files take {held_gb:.3g} GB, over {high_gb:.3g} GB ([limits] "
                    "workspace_high_water of max_workspace_gb)"
                ),
            )
        else:
            self._well(_DISK, "there is room on the disk again")
            return
        self._ill(_DISK, kind, f"{reason}: nothing is claimed until there is room", _ALL)
        self._services.model_store.trim(limit_bytes=0)

    def _model_store_bytes(self) -> int | None:
        now_s = time.monotonic()
        if now_s >= self._store_due_s:
            self._store_due_s = now_s + self._services.settings.scaled(_STORE_LOOK_S)
            with contextlib.suppress(OSError):
                self._store_bytes = self._services.model_store.used_bytes()
        return self._store_bytes

    def _look_at_gpus(self) -> None:
        gpus = self._services.gpus
        if not gpus.expected:
            return
        if gpus.count > self._gpus_placed:
            self._place(gpus)
        if gpus.count:
            self._well("gpu", "the GPUs are there")
        else:
            advice = "no training is claimed; for trainings on the CPU set [worker] gpu to none"
            self._ill("gpu", gpus.reason, f"{gpus.reason}: {advice}", _TRAIN)
        faults = gpus.faults()
        lanes = _TRAIN if len(faults) == gpus.count else _NONE
        for index in range(gpus.count):
            if fault := faults.get(index):
                self._ill(f"gpu-{index}", fault.kind.value, fault.sentence, lanes)
            else:
                self._well(f"gpu-{index}", f"GPU {index} is fit again")
        if gpus.count and gpus.closed:
            self._ill("gpu-closed", "", "; ".join(gpus.closed), _NONE)
        else:
            self._well("gpu-closed", "every GPU can be opened")

    def _place(self, gpus: Gpus) -> None:
        """Make places for the GPUs that were not there when places were made last."""
        wanted = self._services.settings.worker.train_slots
        if wanted == "per-gpu":
            self._train_slots.add([(index,) for index in range(self._gpus_placed, gpus.count)])
        elif self._gpus_placed == 0:  # a fixed number of places that all have a GPU stays as it is
            self._train_slots.add(train_places(gpus, wanted))
        self._gpus_placed = gpus.count

    def _ill(self, source: str, kind: str, reason: str, lanes: frozenset[Lane]) -> None:
        """Note a fault; while its kind stays, so does its sentence, however the figures in it move."""
        if self._faults.get(source) == (kind, lanes):
            return
        self._faults[source] = (kind, lanes)
        self._services.condition.degrade(source, reason, lanes)
        if source == _DISK:
            event(Event.DISK_SHORT).warning("{}; make room, it goes on by itself", reason)
        elif kind in _PASSES:
            event(Event.GPU_UNFIT).warning("{}; it gets jobs again once that is over", reason)
        else:
            event(Event.GPU_UNFIT).error("{}; nvidia-smi and rvmcv-worker doctor say more", reason)

    def _well(self, source: str, news: str) -> None:
        if self._faults.pop(source, None) is not None:
            self._services.condition.recover(source)
            event(Event.DISK_FREE if source == _DISK else Event.GPU_FIT).info("{}: claiming goes on", news)
