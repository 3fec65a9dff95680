"""Readings of the NVIDIA GPUs through NVML; a machine without one has none, and that is no error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pynvml

_MB = 1024 * 1024
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one moment; None where the driver does not tell."""

    index: int
    name: str
    utilization_pct: int | None
    memory_used_mb: int
    memory_total_mb: int
    temperature_c: int | None
    power_w: float | None


class Gpus:
    """NVML, opened once for the daemon's life."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Why there are no GPUs, or "" when there are.
        self.reason = ""
        #: Version of the NVIDIA driver, or "".
        self.driver = ""
        self._handles: list[object] = []
        try:
            pynvml.nvmlInit()
            self.driver = str(pynvml.nvmlSystemGetDriverVersion())
            count = pynvml.nvmlDeviceGetCount()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except pynvml.NVMLError as error:
            self.reason = f"NVML: {error}"

    def device_number(self, index: int) -> int:
        """Return the N of the GPU's `/dev/nvidiaN`, which need not be its index."""
        return int(pynvml.nvmlDeviceGetMinorNumber(self._handles[index]))

    @property
    def count(self) -> int:
        """How many GPUs this machine has."""
        return len(self._handles)

    def read(self) -> list[GpuReading]:
        """Read every GPU; one that does not answer is left out and `reason` says so."""
        readings = []
        with self._lock:
            for index, handle in enumerate(self._handles):
                try:
                    readings.append(_read(index, handle))
                except pynvml.NVMLError as error:
                    self.reason = f"GPU {index}: {error}"
        return readings


def _read(index: int, handle: object) -> GpuReading:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return GpuReading(
        index=index,
        name=str(pynvml.nvmlDeviceGetName(handle)),
        utilization_pct=_optional(lambda: int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
        memory_used_mb=int(memory.used) // _MB,
        memory_total_mb=int(memory.total) // _MB,
        temperature_c=_optional(
            lambda: int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
        ),
        power_w=_optional(lambda: round(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1)),
    )


def _optional(read: Callable[[], _Value]) -> _Value | None:
    """Return what `read` reads, or None where this GPU does not support the question."""
    try:
        return read()
    except pynvml.NVMLError_NotSupported:
        return None
