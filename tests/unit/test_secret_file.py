"""From where a secret is taken, and from where not; no refusal shows anything of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rvmcv_worker import config, secret_file
from rvmcv_worker.config import ConfigError, Settings
from rvmcv_worker.secret_file import SecretFileError

SECRET = "canary-Zq8|secret/of+a=file"


@pytest.fixture
def file() -> Iterator[Path]:
    """A place for a secret that every user of the machine can reach (pytest's own is hidden)."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory) / "token"


def _write(file: Path, content: bytes = SECRET.encode(), mode: int = 0o600) -> None:
    file.write_bytes(content)
    file.chmod(mode)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b" \n\n"])
def test_what_ends_a_line_is_no_part_of_it(file: Path, end: bytes) -> None:
    _write(file, SECRET.encode() + end)
    assert secret_file.read(file) == SECRET


def test_no_file_is_no_secret(file: Path) -> None:
    assert secret_file.read(file) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"canary\r\nZq8", "character 7 of 11 is a space or line break"),
        (b"canary\x00Zq8", "character 7 of 10 is U+0000"),
        (b"canary\xe2\x80\xa8Zq8", "character 7 of 10 is a space or line break"),
        ("canary\u202eZq8".encode(), "character 7 of 10 is U+202E"),
        (b"canary\xffZq8", "byte 7 of 10 is no text"),
        (b"canary-Zq8" * 1000, "larger than 8192 bytes"),
    ],
)
def test_what_no_header_can_carry_is_refused(file: Path, content: bytes, said: str) -> None:
    _write(file, content)
    with pytest.raises(SecretFileError) as caught:
        secret_file.read(file)
    assert f"{file}: {said}" in str(caught.value)
    assert "Zq8" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o666, 0o620])
def test_a_file_that_others_can_reach_is_refused(file: Path, mode: int) -> None:
    _write(file, mode=mode)
    with pytest.raises(SecretFileError, match=rf"can read or write it: chmod 600 {file}"):
        secret_file.read(file)


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_private_file_is_taken(file: Path, mode: int) -> None:
    _write(file, mode=mode)
    assert secret_file.read(file) == SECRET


def test_a_file_that_others_cannot_reach_is_taken(file: Path) -> None:
    _write(file, mode=0o644)
    file.parent.chmod(0o700)
    assert secret_file.read(file) == SECRET


def test_it_counts_where_a_directory_really_is(file: Path) -> None:
    real = file.parent / "real"
    real.mkdir()
    real.chmod(0o755)
    _write(real / "token", mode=0o644)
    with tempfile.TemporaryDirectory(dir="/tmp") as hidden:  # of mode 0700
        (Path(hidden) / "credentials").symlink_to(real)
        with pytest.raises(SecretFileError, match="every user of this machine"):
            secret_file.read(Path(hidden) / "credentials" / "token")


def test_only_roots_file_may_be_its_groups(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(file, mode=0o440)
    if os.geteuid() == 0:
        assert secret_file.read(file) == SECRET, "as systemd gives a credential to a service's user"
        os.chown(file, 12345, -1)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(SecretFileError, match=r"group .* can read or write it"):
        secret_file.read(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(file: Path) -> None:
    _write(file)
    os.chown(file, 12345, -1)
    with pytest.raises(SecretFileError, match="user 12345, whose it is, can change it"):
        secret_file.read(file)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(file: Path) -> None:
    os.mkfifo(file, 0o600)
    with pytest.raises(SecretFileError, match="not a regular file"):
        secret_file.read(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(SecretFileError, match="not a regular file"):
        secret_file.read(file)


def test_a_link_is_refused(file: Path) -> None:
    target = file.with_name("target")
    _write(target)
    file.symlink_to(target)
    with pytest.raises(SecretFileError, match="it is a link"):
        secret_file.read(file)


@pytest.fixture
def settings(file: Path) -> Settings:
    worker = {"runtime_dir": file.parent / "run", "credentials_dir": file.parent}
    return Settings.model_validate({"worker": worker})


@pytest.mark.parametrize("name", ["RVMCV_TOKEN", "RVMCV_S3_SECRET_KEY", "RVMCV_WORKER_TOKEN"])
def test_a_secret_by_environment_is_refused(
    settings: Settings, file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _write(file)
    monkeypatch.setenv(name, "canary-Zq8")
    with pytest.raises(ConfigError, match=rf"{name} holds a secret.*LoadCredential=") as caught:
        config.load_credentials(settings)
    assert "Zq8" not in str(caught.value)


def test_a_secret_is_found_in_the_environment_under_any_name(
    settings: Settings, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(file)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of another program")
    assert config.load_credentials(settings).token.get_secret_value() == SECRET
    monkeypatch.setenv("ANYTHING", SECRET)
    with pytest.raises(ConfigError, match="ANYTHING holds a secret"):
        config.load_credentials(settings)


def test_an_empty_renewed_token_does_not_bring_the_old_one_back(settings: Settings, file: Path) -> None:
    _write(file)
    renewed = settings.worker.runtime_dir / "credentials" / "token"
    renewed.parent.mkdir(parents=True)
    _write(renewed, b"")
    with pytest.raises(ConfigError, match=f"{renewed}: empty"):
        config.load_credentials(settings)


@pytest.mark.parametrize(
    ("there", "lacking"), [("s3-access-key", "s3-secret-key"), ("s3-secret-key", "s3-access-key")]
)
def test_one_key_of_storage_alone_is_refused(
    settings: Settings, file: Path, there: str, lacking: str
) -> None:
    _write(file)
    _write(file.with_name(there))
    with pytest.raises(ConfigError, match=f"there is a file {there}, and no {lacking}"):
        config.load_credentials(settings)


@pytest.mark.parametrize(
    "text",
    [
        "[server]\ntoken = 'canary-Zq8'",
        "[storage]\ns3_access_key = 'canary-Zq8'",
        "[storage]\ns3_secret_key = 'canary-Zq8'",
        "[worker]\napi_key = 'canary-Zq8'",
        "password = 'canary-Zq8'",
    ],
)
def test_a_secret_in_the_configuration_is_refused_with_what_to_do(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"secrets do not belong here.*s3-access-key") as caught:
        config.load(file)
    assert "Zq8" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[server]\nproxy = 'http://me:canary-Zq8@proxy'",
        "[server]\nurl = 'https://me:canary-Zq8@vm100'",
        "[storage]\ns3_endpoint = 'https://me:canary-Zq8@minio'",
        "[server]\nread_timeout_s = 'canary-Zq8'",
        "[worker]\nid = 'canary-Zq8 '",
        "[server]\nurl = 'canary-Zq8",
    ],
)
def test_no_refusal_shows_a_value(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert "Zq8" not in str(caught.value)


def test_credentials_are_masked_however_they_are_printed(settings: Settings, file: Path) -> None:
    for name in config.CREDENTIAL_FILES.values():
        _write(file.with_name(name))
    found = config.load_credentials(settings)
    shown = f"{found!r} {found} {found.model_dump()} {found.model_dump_json()} {config.show(settings)}"
    assert "Zq8" not in shown
    assert shown.count("**********") >= 12
