"""Which model a result says it was made by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rvmcv_worker.config import Settings
from rvmcv_worker.jobs import inference_config, model_choice
from rvmcv_worker.jobs.inference_config import InferenceOptions
from rvmcv_worker.model_store import ModelStore


@pytest.mark.parametrize(
    ("version", "told"), [("v3", "v3"), ("yolo11_v3.pt", "yolo11_v3.pt"), (None, None), ("active", None)]
)
def test_it_is_told_so_that_it_can_be_found_again(
    tmp_path: Path, version: str | None, told: str | None
) -> None:
    store = ModelStore(tmp_path / "store", 1 << 30)
    (tmp_path / "model.pt").write_bytes(b"weights")
    sha256 = store.add(tmp_path / "model.pt")
    storage = SimpleNamespace(promised_model_sha256=lambda _wanted: sha256)
    services = SimpleNamespace(model_store=store, storage=storage, settings=Settings())
    attempt = SimpleNamespace(services=services, interrupt=None)
    config = inference_config.parse(InferenceOptions, {"model_version": version} if version else {})

    chosen = model_choice.choose(attempt, config)  # type: ignore[arg-type]
    assert (chosen.model_used, chosen.model_sha256) == (told or sha256, sha256)
