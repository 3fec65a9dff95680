"""Which faults of an image end its batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rvmcv_worker.config import Settings
from rvmcv_worker.engine_client import InferResult
from rvmcv_worker.errors import ImageInvalidError, JobCrashedError, JobError, ModelInvalidError
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.jobs.batch_images import BatchImages
from rvmcv_worker.manifest import Entry, Listed


def images(tmp_path: Path, *answers: JobError | InferResult) -> BatchImages:
    left = list(answers)

    def fetch(_url: str, path: Path, **_: Any) -> None:
        path.write_bytes(b"an image")

    def infer(*_: Any, **__: Any) -> InferResult:
        answer = left.pop(0)
        if isinstance(answer, InferResult):
            return answer
        raise answer

    services = SimpleNamespace(
        settings=Settings(), storage=SimpleNamespace(fetch=fetch), engines=SimpleNamespace(infer=infer)
    )
    place = SimpleNamespace(in_dir=tmp_path)
    attempt: Any = SimpleNamespace(services=services, workspace=place, interrupt=Interrupt())
    return BatchImages(attempt, None, asked_at_once=2)  # type: ignore[arg-type]


ENTRY = Entry(0, 1, Listed(id="a", url="https://x/a.jpg"))


def test_a_model_that_is_none_ends_the_batch_at_its_first_image(tmp_path: Path) -> None:
    with pytest.raises(ModelInvalidError):
        images(tmp_path, ModelInvalidError("is no checkpoint")).outcome(ENTRY)


@pytest.mark.parametrize(
    ("error", "suspicious"), [(ImageInvalidError("cut off"), False), (JobCrashedError("SIGSEGV"), True)]
)
def test_an_image_at_fault_is_an_error_line(tmp_path: Path, error: JobError, suspicious: bool) -> None:
    outcome = images(tmp_path, error).outcome(ENTRY)
    assert (outcome.error, outcome.suspicious) == (error, suspicious)


def test_a_model_that_fails_at_an_image_after_others_is_no_end(tmp_path: Path) -> None:
    nan = ModelInvalidError("answers with numbers that are not finite")
    batch = images(tmp_path, InferResult({}), nan, InferResult({}))
    assert [batch.outcome(ENTRY).error for _ in range(3)] == [None, nan, None]
