from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rvmcv_worker import quota, workspace
from rvmcv_worker.config import LimitSettings
from rvmcv_worker.errors import DiskQuotaError
from rvmcv_worker.quota import DiskQuota
from rvmcv_worker.workspace import UsageMeter, Workspace


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workspace]:
    with workspace.make(tmp_path / "work", "job", 1) as made:
        yield made


def _limits(**limits: float) -> LimitSettings:
    return LimitSettings.model_validate({"disk_floor_gb": 0.001, "disk_floor_files": 0, **limits})


def _touch(directory: Path, count: int) -> None:
    directory.mkdir(parents=True)
    for number in range(count):
        (directory / str(number)).touch()


def test_few_files_are_counted_at_every_check(place: Workspace) -> None:
    watched = DiskQuota(place, "train", _limits(max_workspace_gb=0.01))
    watched.check()
    (place.child_dir("train") / "large").write_bytes(bytes(11_000_000))
    with pytest.raises(DiskQuotaError, match=r"take 0\.011 GB, over the limit of 0\.01 GB"):
        watched.check()


def test_many_files_are_counted_a_slice_at_a_time(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "_SLICE_S", 0.0)
    monkeypatch.setattr(quota, "_HASTE_S", 0.0)
    watched = DiskQuota(place, "train", _limits(max_archive_entries=600))
    _touch(place.child_dir("train") / "many", 1300)
    for _ in range(1200 // 200):  # as far as the limit, a step of the walk at each check
        watched.check()
    with pytest.raises(DiskQuotaError, match="more than the 1200 files"):
        watched.check()


def test_a_check_stays_short_however_many_files_there_are(place: Workspace) -> None:
    watched = DiskQuota(place, "train", _limits())
    _touch(place.child_dir("train") / "many", 20_000)
    lasted_s = []
    for _ in range(5):
        begun_s = time.thread_time()
        watched.check()
        lasted_s.append(time.thread_time() - begun_s)
    assert max(lasted_s) < 2 * quota._SLICE_S


def test_what_earlier_children_left_counts_too(place: Workspace) -> None:
    (place.child_dir("prepare") / "data").write_bytes(bytes(8_000_000))
    watched = DiskQuota(place, "train", _limits(max_workspace_gb=0.01))
    (place.child_dir("train") / "model").write_bytes(bytes(3_000_000))
    with pytest.raises(DiskQuotaError, match=r"limits\.max_workspace_gb"):
        watched.check()


def test_a_meter_counts_again_only_when_it_is_due(tmp_path: Path) -> None:
    meter = UsageMeter(tmp_path)
    assert meter.read().files == 0
    _touch(tmp_path / "many", 10)
    deadline_s = time.monotonic() + 10
    while meter.read().files != 11 and time.monotonic() < deadline_s:
        pass
    assert meter.read().files == 11
