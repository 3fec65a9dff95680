from __future__ import annotations

import os
from pathlib import Path

import pytest

from rvmcv_worker.config import LimitSettings
from rvmcv_worker.errors import UnsupportedJobError, WorkerUnfitError
from rvmcv_worker.jobs import sam2_sizes
from rvmcv_worker.jobs.sam2_sizes import MODEL_BYTES, UPLOAD_BYTES, cache_bytes, refuse_without_room

_TINY, _LARGE = MODEL_BYTES["sam2.1_hiera_tiny"], MODEL_BYTES["sam2.1_hiera_large"]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on a disk with 100 GB free."""
    fields = list(os.statvfs(tmp_path))
    fields[1], fields[4] = 1_000_000, 100_000  # f_frsize, f_bavail
    monkeypatch.setattr(sam2_sizes.os, "statvfs", lambda _path: os.statvfs_result(fields))
    return tmp_path


def _limits(**limits: float) -> LimitSettings:
    return LimitSettings.model_validate({"disk_floor_gb": 10.0, **limits})


def test_embeddings_stay_below_the_high_water_with_room_for_all_else(disk: Path) -> None:
    limits = _limits(max_workspace_gb=20.0, workspace_high_water=0.8)
    assert cache_bytes(disk, limits, 3_000_000_000, _TINY) == 13_000_000_000 - 6 * _TINY


def test_embeddings_take_half_of_what_the_disk_has_above_its_floor(disk: Path) -> None:
    assert cache_bytes(disk, _limits(max_workspace_gb=500.0), 0, _TINY) == 45_000_000_000 - 6 * _TINY


def test_where_there_is_no_room_there_is_no_cache(disk: Path) -> None:
    assert cache_bytes(disk, _limits(max_workspace_gb=1.0), 900_000_000, _TINY) == 0
    assert cache_bytes(disk, _limits(disk_floor_gb=200.0), 0, _TINY) == 0


def test_the_two_smaller_models_pass_where_only_upload_model_delivers() -> None:
    passing = [name for name, size_bytes in MODEL_BYTES.items() if size_bytes <= UPLOAD_BYTES]
    assert passing == ["sam2.1_hiera_tiny", "sam2.1_hiera_small"]


def test_every_model_has_room_by_default(disk: Path) -> None:
    for size_bytes in MODEL_BYTES.values():
        refuse_without_room(disk, _limits(), "all", size_bytes)


def test_a_training_that_would_end_over_its_quota_is_refused_before_it_begins(disk: Path) -> None:
    limits = _limits(max_workspace_gb=20.0)
    with pytest.raises(
        UnsupportedJobError, match=r"up to 26\.0 GB of disk .* or raise \[limits\] max_workspace_gb"
    ):
        refuse_without_room(disk, limits, "all", _LARGE)
    refuse_without_room(disk, limits, "decoder", _LARGE)
    refuse_without_room(disk, limits, "all", _TINY)


def test_a_disk_that_is_too_full_for_it_now_is_the_workers_fault(disk: Path) -> None:
    limits = _limits(disk_floor_gb=97.0)
    with pytest.raises(WorkerUnfitError, match=r"has 3\.0 GB above \[limits\] disk_floor_gb"):
        refuse_without_room(disk, limits, "all", _TINY)
    refuse_without_room(disk, limits, "decoder", _TINY)
