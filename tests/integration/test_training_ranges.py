"""The ranges of a training job's options are Ultralytics' own, as it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.jobs.yolo11_config import Yolo11Options, parse

pytestmark = pytest.mark.slow

#: In a process of its own: Ultralytics changes PIL and logging for the whole process.
ASK = """
import json, os, sys
os.environ["YOLO_OFFLINE"] = "1"
from ultralytics.cfg import (CFG_BOOL_KEYS, CFG_FLOAT_KEYS, CFG_FRACTION_KEYS, CFG_INT_KEYS, CFG_INT_MIN,
                             DEFAULT_CFG_DICT)
print(json.dumps({"defaults": dict(DEFAULT_CFG_DICT), "fractions": sorted(CFG_FRACTION_KEYS),
                  "ints": sorted(CFG_INT_KEYS), "int_min": dict(CFG_INT_MIN), "bools": sorted(CFG_BOOL_KEYS),
                  "floats": sorted(CFG_FLOAT_KEYS)}, default=str))
"""


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("torch", reason="the extra `compute` is not installed")
    environment = {"YOLO_CONFIG_DIR": str(tmp_path_factory.mktemp("config")), "HOME": "/tmp"}
    run = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def _accepts(key: str, value: object) -> bool:
    try:
        parse({"dataset_id": 1, key: value})
    except InvalidJobError:
        return False
    return True


def test_each_option_is_one_of_ultralytics_with_its_default(ultralytics: dict[str, Any]) -> None:
    ours_on_purpose = {"patience": 50}  # the plan's default
    for key, field in Yolo11Options.model_fields.items():
        assert key in ultralytics["defaults"], key
        assert field.default == ours_on_purpose.get(key, ultralytics["defaults"][key]), key


def test_fractions_end_where_ultralytics_ends_them(ultralytics: dict[str, Any]) -> None:
    tested = set(Yolo11Options.model_fields) & set(ultralytics["fractions"])
    assert len(tested) > 15
    narrower = {"lr0", "fraction"}  # 0 trains nothing
    for key in tested - {"perspective"}:
        assert _accepts(key, 1.0), key
        assert not _accepts(key, 1.001), key
        assert not _accepts(key, -0.001), key
        assert _accepts(key, 0.0) is (key not in narrower), key


def test_whole_numbers_begin_where_ultralytics_begins_them(ultralytics: dict[str, Any]) -> None:
    for key in set(Yolo11Options.model_fields) & set(ultralytics["ints"]):
        assert not _accepts(key, 1.5), key
        if key in ultralytics["int_min"]:
            assert not _accepts(key, ultralytics["int_min"][key] - 1), key


def test_every_augmentation_gain_can_be_set(ultralytics: dict[str, Any]) -> None:
    gains = {
        "hsv_h",
        "hsv_s",
        "hsv_v",
        "degrees",
        "translate",
        "scale",
        "shear",
        "perspective",
        "flipud",
        "fliplr",
    }
    gains |= {"bgr", "mosaic", "mixup", "cutmix", "copy_paste"}
    assert gains <= set(ultralytics["defaults"])
    assert gains <= set(Yolo11Options.model_fields)
