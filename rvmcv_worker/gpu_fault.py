"""Why a GPU gets no job now: one judgement for one reading."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from rvmcv_worker.config import Settings
from rvmcv_worker.nvml import XID_OFF_THE_BUS, GpuIdentity, GpuReading

_GIB = 1024**3
#: What driver and CUDA contexts keep of a GPU's memory beside what a job allocates.
_DRIVER_BYTES = int(1.5 * _GIB)
#: A GPU that was too hot must cool down this far below the limit, in degrees Celsius.
_COOLER_C = 5.0


class FaultKind(enum.Enum):
    """What is wrong; a fault is news when its kind changes, not when a figure in its sentence does."""

    LOST = "lost"  #: it was there and is not any more
    SILENT = "silent"  #: NVML does not answer
    NVML = "nvml"  #: NVML answers with an error
    XID = "xid"  #: the driver has met an error of the hardware
    ECC = "ecc"  #: its memory has errors that cannot be corrected
    HOT = "hot"  #: over the temperature limit
    FULL = "full"  #: others hold memory that a job may need


@dataclass(frozen=True)
class GpuFault:
    """Why a GPU gets no job, as people read it; only one that is lost ends the job that it has."""

    kind: FaultKind
    sentence: str

    @property
    def ends_jobs(self) -> bool:
        """Whether a job on it cannot go on."""
        return self.kind is FaultKind.LOST


def job_bytes(gpu: GpuIdentity, settings: Settings) -> int:
    """Return how much of a GPU's memory a job may take."""
    total = gpu.memory_total_bytes
    return min(settings.job_gpu_memory_bytes, max(total - _DRIVER_BYTES, total // 2))


def judge(
    index: int,
    gpu: GpuIdentity,
    reading: GpuReading,
    *,
    settings: Settings,
    xid: int | None = None,
    before: GpuFault | None = None,
) -> GpuFault | None:
    """Return what is wrong with a GPU that answers; `xid` is one that it is still to recover from."""
    limits = settings.limits
    which = f"GPU {index} ({gpu.name})"
    if xid == XID_OFF_THE_BUS:
        return GpuFault(FaultKind.LOST, f"{which} has fallen off the bus (Xid {xid})")
    if xid is not None:
        return GpuFault(
            FaultKind.XID, f"{which} had Xid {xid}: it gets no job for a while; `dmesg | grep Xid` says more"
        )
    if reading.ecc_errors is not None and reading.ecc_errors > limits.max_gpu_ecc_errors:
        return GpuFault(
            FaultKind.ECC,
            f"{which} has {reading.ecc_errors} uncorrectable memory errors, more than [limits] "
            f"max_gpu_ecc_errors = {limits.max_gpu_ecc_errors}: reset it with `nvidia-smi -r -i {index}`",
        )
    was_hot = before is not None and before.kind is FaultKind.HOT
    limit_c = limits.max_gpu_temperature_c - (_COOLER_C if was_hot else 0.0)
    if reading.temperature_c is not None and reading.temperature_c > limit_c:
        return GpuFault(
            FaultKind.HOT,
            f"{which} is too hot: {reading.temperature_c} °C, [limits] max_gpu_temperature_c is "
            f"{limits.max_gpu_temperature_c:g}",
        )
    needed, free = job_bytes(gpu, settings), reading.memory_free_bytes + reading.memory_own_bytes
    if free < needed:
        return GpuFault(
            FaultKind.FULL,
            f"{which} has {free / _GIB:.1f} GB of memory for us, a job may take {needed / _GIB:.1f} GB: see "
            "with nvidia-smi who holds the rest, or lower [limits] max_gpu_memory_gb",
        )
    return None
