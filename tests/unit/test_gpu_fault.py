from __future__ import annotations

from dataclasses import replace

import pytest

from rvmcv_worker.config import Settings
from rvmcv_worker.gpu_fault import FaultKind, job_bytes, judge
from rvmcv_worker.nvml import GpuIdentity, GpuReading

GIB = 1024**3
GPU = GpuIdentity("GPU-1", "RTX", 0, 24 * GIB)
WELL = GpuReading(
    memory_free_bytes=23 * GIB,
    memory_own_bytes=0,
    utilization_pct=0,
    temperature_c=50,
    power_w=30.0,
    ecc_errors=None,
)
SETTINGS = Settings()


def _kind(reading: GpuReading, **given: object) -> FaultKind | None:
    fault = judge(0, GPU, reading, settings=SETTINGS, **given)  # type: ignore[arg-type]
    return fault and fault.kind


def test_a_gpu_that_is_well_has_no_fault() -> None:
    assert _kind(WELL) is None
    assert _kind(replace(WELL, temperature_c=None, power_w=None, ecc_errors=0)) is None


def test_a_hot_gpu_must_cool_down_below_the_limit() -> None:
    hot = judge(0, GPU, replace(WELL, temperature_c=91), settings=SETTINGS)
    assert hot is not None
    assert (hot.kind, hot.ends_jobs) == (FaultKind.HOT, False)
    assert _kind(replace(WELL, temperature_c=90)) is None
    assert _kind(replace(WELL, temperature_c=86), before=hot) is FaultKind.HOT
    assert _kind(replace(WELL, temperature_c=85), before=hot) is None


def test_memory_of_our_own_counts_as_free() -> None:
    assert _kind(replace(WELL, memory_free_bytes=18 * GIB)) is FaultKind.FULL
    assert _kind(replace(WELL, memory_free_bytes=16 * GIB, memory_own_bytes=3 * GIB)) is None


def test_only_a_gpu_off_the_bus_ends_its_job() -> None:
    lost = judge(0, GPU, WELL, settings=SETTINGS, xid=79)
    ill = judge(0, GPU, WELL, settings=SETTINGS, xid=62)
    assert lost is not None
    assert ill is not None
    assert (lost.kind, lost.ends_jobs) == (FaultKind.LOST, True)
    assert (ill.kind, ill.ends_jobs) == (FaultKind.XID, False)


def test_ecc_errors_up_to_the_limit_are_borne() -> None:
    assert _kind(replace(WELL, ecc_errors=1)) is FaultKind.ECC
    tolerant = Settings.model_validate({"limits": {"max_gpu_ecc_errors": 1}})
    assert judge(0, GPU, replace(WELL, ecc_errors=1), settings=tolerant) is None


@pytest.mark.parametrize(
    ("total_gib", "job_types", "job_gib"),
    [
        (24, ["yolo11"], 22),
        (80, ["yolo11"], 22),
        (24, ["yolo11", "inference"], 19),  # the engine has its part
        (16, ["yolo11"], 14.5),
        (2, ["yolo11"], 1),
    ],
)
def test_what_a_job_may_take_of_a_gpu(total_gib: int, job_types: list[str], job_gib: float) -> None:
    settings = Settings.model_validate({"worker": {"job_types": job_types}})
    assert job_bytes(replace(GPU, memory_total_bytes=total_gib * GIB), settings) == job_gib * GIB
