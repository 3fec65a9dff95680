from __future__ import annotations

import pytest

from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.jobs import JOB_TYPES
from rvmcv_worker.jobs.sam2_config import Architecture, parse
from rvmcv_worker.sam2_options import ARCHITECTURES

DATA = {"dataset_url": "s3://datasets/a.zip"}


def test_a_job_that_says_nothing_trains_the_decoder_of_the_smallest_model() -> None:
    config = parse(DATA)
    assert (config.base_model, config.scratch_architecture) == ("sam2.1_hiera_tiny", None)
    assert (config.options.train, config.options.imgsz, config.options.epochs) == ("decoder", 1024, 40)


def test_names_are_those_of_a_yolo11_job_where_they_mean_the_same() -> None:
    ours = parse({**DATA, "img_size": 512, "batch_size": 2, "base_model": "v1", "time_limit_h": 1})
    theirs = parse({**DATA, "imgsz": 512, "batch": 2, "model": "v1", "time": 1, "project": "x", "save": 1})
    assert ours == theirs
    assert (ours.options.imgsz, ours.options.batch) == (512, 2)


def test_a_start_from_scratch_may_say_which_of_the_four() -> None:
    assert parse({**DATA, "base_model": "scratch"}).scratch_architecture == "sam2.1_hiera_tiny"
    config = parse({**DATA, "base_model": "scratch", "architecture": "sam2.1_hiera_large"})
    assert config.scratch_architecture == "sam2.1_hiera_large"
    assert set(Architecture.__args__) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"epochs": 0}, "config.epochs: should be greater than or equal to 1 (it is '0')"),
        ({"clickz": 3}, "config.clickz: no such option; did you mean 'clicks'?"),
        ({"img_size": 1000}, "config.img_size: should be a multiple of 32"),
        ({"img_size": 2048}, "config.img_size: should be less than or equal to 1024"),
        ({"img_size": 512, "imgsz": 1024}, "img_size and imgsz mean the same and differ"),
        ({"batch": 0}, "config.batch"),
        ({"train": "encoder"}, "config.train: should be 'decoder', 'decoder+neck' or 'all'"),
        ({"train": "all", "cache": "disk"}, "config.cache: 'disk' has nothing to keep with train 'all'"),
        ({"train": "all", "cache": "ram"}, "config.cache: 'ram' has nothing to keep"),
        ({"lr0": 0}, "config.lr0"),
        ({"lr0": float("nan")}, "config.lr0"),
        ({"optimizer": "SGD"}, "config.optimizer: no such option"),
        ({"mosaic": 1.0}, "config.mosaic: no such option"),
        ({"architecture": "sam2.1_hiera_tiny"}, "config.architecture: goes with base_model 'scratch' only"),
        ({"architecture": "tiny", "base_model": "scratch"}, "config.architecture: should be 'sam2.1_hiera_t"),
        ({"base_model": "scratch", "base_model_sha256": "0" * 64}, "config.base_model_sha256: base_model is"),
        ({"base_model": "../../etc/passwd"}, "config.base_model"),
        ({"gpus": 2}, "config.gpus: 2 GPUs are asked for, but SAM2 trains on one"),
        ({"device": "0,1"}, "config.device: 2 GPUs are asked for"),
        ({"names": ["a\nb"]}, "config.names"),
    ],
)
def test_what_is_wrong_is_named(config: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        parse({**DATA, **config})
    assert said in caught.value.message


def test_a_job_that_asks_for_several_gpus_takes_no_more_than_one() -> None:
    assert JOB_TYPES["sam2"].gpus({"gpus": 4}) == 1
