"""What the demo has a fine-tuning of SAM2 begin with, and how large its pictures are."""

from __future__ import annotations

from pathlib import Path

import pytest

from rvmcv_worker.demo import material
from rvmcv_worker.demo.drawing import draw_dataset
from rvmcv_worker.demo.wishes import Wishes
from rvmcv_worker.jobs import sam2_config


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    draw_dataset(tmp_path / "data", train=1, val=1, test=0, size_px=64, seed=1, segment=True)
    return tmp_path / "data"


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_fine_tuning_is_a_job_that_the_worker_takes(
    tmp_path: Path, dataset: Path, checkpoint: bool
) -> None:
    sam2 = tmp_path / "sam2.1_hiera_small.pt" if checkpoint else None
    if sam2:
        sam2.write_bytes(b"weights")

    found = material.prepare(Wishes(dataset=dataset, sam2=sam2, segment=True), tmp_path).segmenting

    assert found is not None
    assert found.pop("job_type") == "sam2"
    options = found.pop("options")
    config = sam2_config.parse({**found, **options, "dataset_url": "s3://datasets/demo.zip"})
    assert config.base_model == ("sam2.1_hiera_small" if checkpoint else "scratch")
    # What random weights need would spoil others.
    assert (config.options.lr0 is None) == checkpoint


@pytest.mark.parametrize(("wished", "taken"), [(16, 64), (64, 64), (100, 128), (2000, 1024)])
def test_pictures_are_of_the_next_size_that_sam2_takes(
    tmp_path: Path, dataset: Path, wished: int, taken: int
) -> None:
    wishes = Wishes(dataset=dataset, epochs=2, img_size=wished, segment=True)

    data = material.prepare(wishes, tmp_path)

    assert data.segmenting is not None
    assert (data.segmenting["img_size"], data.segmenting["epochs"]) == (taken, 2)
    assert (data.training["img_size"], data.training["epochs"]) == (wished, 2)


def test_without_a_wish_for_it_nothing_is_fine_tuned(tmp_path: Path, dataset: Path) -> None:
    assert material.prepare(Wishes(dataset=dataset), tmp_path).segmenting is None
