"""What the doctor finds without a server."""

from __future__ import annotations

from pathlib import Path

import certifi
import pytest

from rvmcv_worker import doctor
from rvmcv_worker.config import Settings


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


def test_a_secret_that_every_user_can_read_is_told(tmp_path: Path) -> None:
    token = tmp_path / "credentials" / "token"
    token.parent.mkdir(mode=0o700)
    token.write_text("token")
    settings = Settings.model_validate(
        {"worker": {"credentials_dir": token.parent, "runtime_dir": tmp_path, "state_dir": tmp_path}}
    )
    token.chmod(0o622)
    token.parent.chmod(0o711)
    found = next(doctor.findings(settings))
    if all(parent.stat().st_mode & 0o001 for parent in tmp_path.parents):
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
