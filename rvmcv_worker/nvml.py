"""NVML as one thread uses it: open it, read every GPU, hear of Xids. Any call may fail, block, or both.

A session holds the handles of the GPUs that were there when it was opened. What was lost since shows
only in a new one, so that a GPU is known by its UUID: its place in NVML's list moves.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import pynvml

#: Xids that tell of a program's fault, not of the GPU's, as in NVIDIA's own health check
#: (github.com/NVIDIA/k8s-device-plugin, internal/rm/health.go).
APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 109})
#: The Xid of a GPU that has fallen off the bus.
XID_OFF_THE_BUS = 79

#: Answers that mean that the GPU is gone, not that the question was wrong.
_GONE = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_GPU_NOT_FOUND, pynvml.NVML_ERROR_RESET_REQUIRED)

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class GpuIdentity:
    """What does not change about a GPU; `device_number` is the N of its `/dev/nvidiaN`."""

    uuid: str
    name: str
    device_number: int
    memory_total_bytes: int


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one moment; None where the driver does not tell."""

    memory_free_bytes: int
    #: Held by processes that this one has started, itself included.
    memory_own_bytes: int
    utilization_pct: int | None
    temperature_c: int | None
    power_w: float | None
    #: Uncorrectable memory errors since the GPU's last reset.
    ecc_errors: int | None


def is_installed() -> bool:
    """Whether the driver's library is here; it need not work."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def is_gone(error: pynvml.NVMLError) -> bool:
    """Whether an error means that the GPU is lost."""
    return error.value in _GONE


class NvmlSession:
    """NVML from `nvmlInit` to `nvmlShutdown`; raises `pynvml.NVMLError`. Not for two threads at once."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        try:
            self.driver = str(pynvml.nvmlSystemGetDriverVersion())
            #: The GPUs that are there, in NVML's order.
            self.gpus: list[GpuIdentity] = []
            #: One error for each that is listed and cannot be opened.
            self.closed: list[pynvml.NVMLError] = []
            self._handles: dict[str, Any] = {}
            for index in range(pynvml.nvmlDeviceGetCount()):
                try:
                    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                    gpu = _identify(handle)
                except pynvml.NVMLError as error:
                    self.closed.append(error)
                else:
                    self.gpus.append(gpu)
                    self._handles[gpu.uuid] = handle
            self._events = self._listen()
        except pynvml.NVMLError:
            pynvml.nvmlShutdown()
            raise

    def read(self, uuid: str) -> GpuReading:
        """Read one GPU."""
        handle = self._handles[uuid]
        # The processes first: one that ends in between makes the GPU look emptier, not fuller.
        own_bytes = sum(
            process.usedGpuMemory or 0
            for process in _optional(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()
            if _is_own(process.pid)
        )
        return GpuReading(
            memory_free_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            memory_own_bytes=own_bytes,
            utilization_pct=_optional(lambda: int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            temperature_c=_optional(
                lambda: int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
            ),
            power_w=_optional(lambda: round(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1)),
            ecc_errors=_optional(
                lambda: int(
                    pynvml.nvmlDeviceGetTotalEccErrors(
                        handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
                    )
                )
            ),
        )

    @property
    def hears_xids(self) -> bool:
        """Whether `next_xid` can say anything; virtual GPUs have no events."""
        return self._events is not None

    def next_xid(self, within_s: float) -> tuple[str, int] | None:
        """Wait for a critical Xid; returns the GPU's UUID and the Xid, or None when none came in time."""
        try:
            event = pynvml.nvmlEventSetWait(self._events, int(within_s * 1000))
        except pynvml.NVMLError_Timeout:
            return None
        found = [uuid for uuid, handle in self._handles.items() if _address(handle) == _address(event.device)]
        return (found[0], int(event.eventData)) if found else None

    def close(self) -> None:
        """End the session, whatever state NVML is in."""
        for call in (lambda: self._events and pynvml.nvmlEventSetFree(self._events), pynvml.nvmlShutdown):
            try:
                call()
            except pynvml.NVMLError:
                continue

    def _listen(self) -> Any | None:
        try:
            events = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError:
            return None
        heard = False
        for handle in self._handles.values():
            try:
                pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
                heard = True
            except pynvml.NVMLError:  # not every GPU has them, and one that is lost says so when it is read
                continue
        if not heard:
            pynvml.nvmlEventSetFree(events)
            return None
        return events


def _identify(handle: Any) -> GpuIdentity:
    return GpuIdentity(
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        name=str(pynvml.nvmlDeviceGetName(handle)),
        device_number=int(pynvml.nvmlDeviceGetMinorNumber(handle)),
        memory_total_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _is_own(pid: int) -> bool:
    """Whether a process is this one or descends from it."""
    try:
        process: psutil.Process | None = psutil.Process(pid)
        while process is not None and process.pid != os.getpid():
            process = process.parent()
    except psutil.Error:
        return False
    return process is not None


def _optional(read: Callable[[], _Value]) -> _Value | None:
    """Return what `read` reads, or None where this GPU or driver does not support the question."""
    try:
        return read()
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return None
