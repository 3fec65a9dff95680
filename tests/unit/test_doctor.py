"""What the doctor finds without a server."""

from __future__ import annotations

import tempfile
from pathlib import Path

import certifi
import pytest

from rvmcv_worker import doctor
from rvmcv_worker.config import Settings
from rvmcv_worker.health import HealthSocket
from rvmcv_worker.routes import Answer


@pytest.mark.parametrize(
    ("text", "ok", "said"),
    [
        (Path(certifi.where()).read_text(), True, ""),
        ("not a certificate", False, "it must be PEM"),
        (None, False, "No such file or directory; correct [server] ca_file"),
    ],
)
def test_the_private_ca_is_looked_at(tmp_path: Path, text: str | None, ok: bool, said: str) -> None:
    file = tmp_path / "ca.pem"
    if text is not None:
        file.write_text(text)
    (finding,) = doctor._ca_file(Settings.model_validate({"server": {"ca_file": file}}))
    assert finding.ok is ok
    assert said in finding.sentence
    assert str(file) in finding.sentence


def test_a_secret_that_every_user_can_write_is_told(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own may be hidden from other users
        token = Path(directory) / "token"
        token.write_text("token")
        token.chmod(0o622)
        token.parent.chmod(0o711)
        settings = Settings.model_validate(
            {"worker": {"credentials_dir": token.parent, "runtime_dir": tmp_path, "state_dir": tmp_path}}
        )
        found = next(doctor.findings(settings))
    assert (found.subject, found.ok) == ("token", False)
    assert f"chmod 600 {token}" in found.sentence


def test_a_state_directory_that_is_a_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.touch()
    finding = doctor._disk(Settings.model_validate({"worker": {"state_dir": file}}))
    assert finding.ok is False
    assert f"{file} is no directory" in finding.sentence
    below = doctor._disk(Settings.model_validate({"worker": {"state_dir": file / "below"}}))
    assert below.ok is False


@pytest.mark.parametrize(
    ("job_types", "ok", "said"),
    [
        (["yolo11"], True, "claims yolo11; not sam2, inference, batch-inference, which [worker] job_types"),
        (["yolo11", "sam2", "inference", "batch-inference"], True, "batch-inference"),
        (
            ["yolo11", "sam-2"],
            False,
            "no job type 'sam-2': correct [worker] job_types to some of yolo11, sam2",
        ),
    ],
)
def test_what_is_claimed_and_what_could_be_is_told(job_types: list[str], ok: bool, said: str) -> None:
    finding = doctor._jobs(Settings.model_validate({"worker": {"job_types": job_types}}))
    assert finding.ok is ok
    assert said in finding.sentence
    assert "stub" not in finding.sentence.partition(": ")[0]


@pytest.mark.parametrize(
    ("state", "reasons", "ok", "said"),
    [
        ("ready", [], True, "is ready"),
        (
            "degraded",
            ["no wall, no claims", "GPU 0 is hot"],
            None,
            "degraded: no wall, no claims; GPU 0 is hot",
        ),
    ],
)
def test_what_the_running_worker_says_of_itself_is_told(
    tmp_path: Path, state: str, reasons: list[str], ok: bool | None, said: str
) -> None:
    status = {"state": state, "reasons": reasons}
    health = HealthSocket(tmp_path, {("GET", "/status"): lambda: Answer.of(status)})
    health.start()
    try:
        found = doctor._worker(Settings.model_validate({"worker": {"runtime_dir": tmp_path}}))
    finally:
        health.close()
    assert found.ok is ok
    assert said in found.sentence


def test_a_worker_that_does_not_run_is_no_fault_of_the_machine(tmp_path: Path) -> None:
    found = doctor._worker(Settings.model_validate({"worker": {"runtime_dir": tmp_path}}))
    assert found.ok is None
    assert "does not run" in found.sentence
