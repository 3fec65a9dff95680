from __future__ import annotations

import pytest

from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.jobs.training_config import gpus_wanted
from rvmcv_worker.jobs.yolo11_config import parse

DATA = {"dataset_url": "s3://datasets/a.zip"}


def test_the_plans_names_and_ultralytics_mean_the_same() -> None:
    ours = parse({**DATA, "img_size": 320, "batch_size": 4, "base_model": "yolo11s.pt"})
    theirs = parse({**DATA, "imgsz": 320, "batch": 4, "model": "yolo11s.pt"})
    assert ours == theirs
    assert ours.options.imgsz == 320


def test_keys_that_are_the_workers_to_set_are_ignored() -> None:
    assert parse({**DATA, "project": "x", "name": "y", "exist_ok": True, "data": "z", "save": 1}) == parse(
        DATA
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"epochs": -1}, "config.epochs: should be greater than or equal to 1 (it is '-1')"),
        ({"epoch": 3}, "config.epoch: no such option; did you mean 'epochs'?"),
        ({"img_sise": 3}, "did you mean 'img_size'?"),
        ({"lr0": float("nan")}, "config.lr0"),
        ({"optimizer": "Adamm"}, "config.optimizer: must be one of SGD"),
        ({"img_size": 320, "imgsz": 640}, "mean the same and differ"),
        ({"base_model": "../../etc/passwd"}, "config.base_model"),
        ({"base_model": "/x.pt"}, "config.base_model"),
        ({"dataset_sha256": "abc"}, "config.dataset_sha256"),
        ({"device": "cpu"}, "config.device"),
        ({"time_limit_h": 0}, "config.time_limit_h"),
        ({"names": []}, "config.names"),
    ],
)
def test_what_is_wrong_is_named(config: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        parse({**DATA, **config})
    assert said in caught.value.message


def test_a_key_does_not_differ_from_itself() -> None:
    with pytest.raises(InvalidJobError) as caught:
        parse({**DATA, "lr0": float("nan")})
    assert "differ" not in caught.value.message


def test_every_fault_is_said_at_once() -> None:
    with pytest.raises(InvalidJobError) as caught:
        parse({"epochs": 0, "patiense": 1})
    for said in ("config.epochs", "config.patiense", "dataset_id or dataset_url is missing"):
        assert said in caught.value.message


@pytest.mark.parametrize(("device", "gpus"), [("0", 1), (0, 1), ("0,1", 2), ([0, 1], 2), ("[0,1]", 2)])
def test_device_is_a_count(device: object, gpus: int) -> None:
    assert parse({**DATA, "device": device}).device == gpus


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({}, "detect"),
        ({"base_model": "yolo11n-seg.pt"}, "segment"),
        ({"base_model": "v3", "task": "segment"}, "segment"),
    ],
)
def test_the_task_follows_the_model_unless_it_is_said(config: dict[str, object], task: str) -> None:
    assert parse({**DATA, **config}).label_task == task


def test_a_scratch_model_is_one_of_the_list() -> None:
    assert parse({**DATA, "base_model": "yolo11x-seg.yaml"}).from_scratch
    assert not parse({**DATA, "base_model": "mine.yaml"}).from_scratch


def test_several_gpus_need_a_picture_each() -> None:
    assert parse({**DATA, "gpus": 2, "batch_size": 2}).gpus == 2
    with pytest.raises(InvalidJobError, match="batch_size: 3 is less than one picture for each of 4 GPUs"):
        parse({**DATA, "device": "0,1,2,3", "batch": 3})


@pytest.mark.parametrize(
    ("config", "gpus"), [({}, 1), ({"gpus": 2}, 2), ({"device": "0,1,2"}, 3), ({"gpus": "x"}, 1)]
)
def test_how_many_gpus_are_wanted_is_known_before_the_config_is_parsed(
    config: dict[str, object], gpus: int
) -> None:
    assert gpus_wanted(config) == gpus
