"""The demo as a user runs it, on a data set of their own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rvmcv_worker.demo.drawing import draw_dataset
from rvmcv_worker.exit_codes import ExitCode

pytestmark = pytest.mark.slow


def _demo(directory: Path, dataset: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run two epochs at 64 px; what the demo leaves in its temporary folder stays visible."""
    (directory / "tmp").mkdir()
    command = [sys.executable, "-m", "rvmcv_worker.cli", "demo", "--dataset", str(dataset)]
    command += ["--epochs", "2", "--img-size", "64", *options]
    command += ["--json", str(directory / "summary.json"), "--out", str(directory / "out")]
    return subprocess.run(
        ["env", f"TMPDIR={directory / 'tmp'}", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_a_folder_becomes_models_that_answer_and_nothing_stays(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "data", train=16, val=5, test=3, size_px=96, seed=3, segment=True)
    (tmp_path / "data" / "images" / "train" / "link.jpg").symlink_to("/etc/hostname")

    done = _demo(tmp_path, tmp_path / "data", "--segment")

    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    job, fine_tuning, *inferences = summary["jobs"]
    assert (job["job_type"], job["status"], job["attempt"], job["error"]) == ("yolo11", "completed", 1, None)
    assert job["result"]["data"]["splits"]["train"]["images"] == 16
    sha256 = hashlib.sha256((tmp_path / "out" / "best.pt").read_bytes()).hexdigest()
    assert job["result"]["sha256_hash"] == sha256
    assert done.stdout.count("(equal)") == 2
    for epoch in (1, 2):
        assert done.stdout.count(f"epoch {epoch}/2") == 2
    _assert_fine_tuned(fine_tuning, done.stdout, tmp_path / "out" / "sam2")
    *inferences, tuned_1, tuned_2, tuned_3 = inferences
    tuned = {each["result"]["segmenter_used"] for each in (tuned_1, tuned_2, tuned_3)}
    assert tuned == {fine_tuning["result"]["version"]}
    *alone, batch, drawn, mask_1, mask_2, mask_3 = inferences
    assert [each["job_type"] for each in alone] == ["inference"] * len(alone)
    assert {each["status"] for each in inferences} == {"completed"}
    assert {each["result"]["model_sha256"] for each in inferences} == {sha256}
    assert "One by one, 3 pictures of test" in done.stdout
    honest, *made_up = [each["result"]["comparison"] for each in alone[3:]]
    assert not honest["mismatch"]
    assert [reason["code"] for reason in made_up[-1]["reasons"]] == ["missing_at_server"]
    assert done.stdout.count("MISMATCH") == len(made_up)
    assert batch["job_type"] == "batch-inference"
    assert (batch["result"]["images_ok"], batch["result"]["images_failed"]) == (5, 0)
    assert drawn["result"]["annotated_path"].startswith("s3://")
    assert {each["result"]["segmenter_used"] for each in (mask_1, mask_2, mask_3)} == {"yolo"}
    assert summary["workspace_files_left"] == 0
    assert summary["listening_sockets"] == 0
    assert 10 < summary["daemon_peak_rss_mb"] < 500
    for name in ("detections.png", "masks.png", "masks_fine_tuned.png"):
        with Image.open(tmp_path / "out" / name) as sheet:
            assert sheet.width > 3 * 320
    with Image.open(tmp_path / "out" / "annotated.jpg") as picture:
        assert picture.width == picture.height >= 96
    assert list((tmp_path / "tmp").iterdir()) == []


def _assert_fine_tuned(job: dict[str, Any], told: str, folder: Path) -> None:
    """Look at the fine-tuning of SAM2: its figures beside others, its model, its pictures."""
    assert (job["job_type"], job["status"], job["error"]) == ("sam2", "completed", None)
    metrics = job["result"]["metrics"]
    base, box = metrics["base"]["miou"], metrics["box_as_mask"]["miou"]
    assert told.count(f"(base {base:.3f}, the box itself {box:.3f})  loss ") == 2
    assert f"Verdict: {metrics['verdict']}." in told
    assert job["result"]["sha256_hash"] == hashlib.sha256((folder / "best.pt").read_bytes()).hexdigest()
    for name in ("masks.jpg", "curves.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200


def test_a_data_set_that_cannot_be_trained_on_ends_with_its_code(tmp_path: Path) -> None:
    data = tmp_path / "data"
    draw_dataset(data, train=8, val=4, test=0, size_px=96, seed=3)
    for label in data.glob("labels/*/*.txt"):
        label.write_text("7 0.5 0.5 0.2 0.2\n")

    done = _demo(tmp_path, data)

    assert done.returncode == ExitCode.FAILED
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["jobs"][0]["status"], summary["workspace_files_left"]) == ("failed", 0)
    assert summary["jobs"][0]["error"]["code"] == "dataset_invalid"
    assert "dataset_invalid" in done.stdout
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_file_that_is_no_sam2_is_told_before_anything_starts(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "data", train=1, val=1, test=0, size_px=96, seed=3)
    (tmp_path / "sam2.pt").write_bytes(b"")

    done = _demo(tmp_path, tmp_path / "data", "--sam2", str(tmp_path / "sam2.pt"))

    assert done.returncode == ExitCode.FAILED
    assert "sam2.pt is no SAM2.1 checkpoint" in done.stdout
    assert "sam2.1_hiera_tiny.pt" in done.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["jobs"] == []


def test_boxes_that_sam2_is_to_learn_from_are_told_before_anything_starts(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "data", train=1, val=1, test=0, size_px=96, seed=3)

    done = _demo(tmp_path, tmp_path / "data", "--segment")

    assert done.returncode == ExitCode.FAILED
    assert "boxes where SAM2 needs outlines" in done.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["jobs"] == []


@pytest.mark.parametrize("kind", ["empty", "text"])
def test_what_is_no_data_set_is_told_before_anything_starts(tmp_path: Path, kind: str) -> None:
    dataset = tmp_path / kind
    if kind == "empty":
        dataset.mkdir()
    else:
        dataset.write_text("not a zip")

    done = _demo(tmp_path, dataset)

    assert done.returncode == ExitCode.FAILED
    assert str(dataset) in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["jobs"] == []
    assert list((tmp_path / "tmp").iterdir()) == []
