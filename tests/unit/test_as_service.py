"""Root's `doctor` looks with the installed service's eyes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rvmcv_worker import as_service


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that systemd runs, with a service that has a token; returns where that lies."""
    monkeypatch.setattr(as_service, "_BOOTED", tmp_path)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "token").write_text("secret of the test")
    monkeypatch.setattr(as_service, "CREDENTIALS", credentials)
    monkeypatch.setattr(as_service.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    return credentials


def test_root_asks_as_the_services_user_with_the_credentials_that_there_are(installed: Path) -> None:
    command = as_service.command_line(["doctor", "--sandbox"])
    assert command is not None
    assert command[0] == "/usr/bin/systemd-run"
    assert {"--property=User=rvmcv-worker", f"--property=LoadCredential=token:{installed}/token"} <= {
        *command
    }
    assert "s3-access-key" not in " ".join(command), "there is none"
    assert command[-5:] == [sys.executable, "-m", "rvmcv_worker.cli", "doctor", "--sandbox"]
    assert "secret" not in " ".join(command)


def test_it_does_not_ask_itself_again(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(installed))
    assert as_service.command_line(["doctor"]) is None


def test_nobody_but_root_is_another(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert as_service.command_line(["doctor"]) is None


def test_without_an_installed_service_root_asks_as_itself(installed: Path) -> None:
    (installed / "token").unlink()
    installed.rmdir()
    assert as_service.command_line(["doctor"]) is None
