from __future__ import annotations

from pathlib import Path

import pytest

from rvmcv_worker import config
from rvmcv_worker.config import ConfigError, Settings

EXAMPLE = Path(__file__).parents[2] / "config.toml"


def test_the_example_equals_the_defaults() -> None:
    assert config.load(EXAMPLE) == Settings()


def test_the_example_names_every_key() -> None:
    text = EXAMPLE.read_text()
    for section, model in Settings():
        assert f"\n[{section}]\n" in text
        for key in type(model).model_fields:
            assert f"\n{key} = " in text or f"\n# {key} = " in text, f"[{section}] {key}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nurll = 'https://x'", "unknown key 'server.urll'; did you mean 'url'?"),
        ("[servr]\nurl = 'https://x'", "unknown key 'servr'; did you mean 'server'?"),
        ("[server]\nurl = 'ftp://x'", "server.url: Value error, must be http(s)://host[:port]"),
        ("[server]\nurl = 'https://me:secret@x'", "server.url"),
        ("[limits]\nmax_job_h = -1", "limits.max_job_h: Input should be greater than 0"),
        ("[server\nurl = 1", "(at line 1, column 8)"),
        ("[worker]\nid = '../x'", "worker.id"),
        (
            "[worker]\njob_types = ['inference']\n[limits]\nmax_gpu_memory_gb = 3",
            "limits.engine_gpu_memory_gb",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert str(file) in str(caught.value)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"copy config\.toml there"):
        config.load(tmp_path / "none.toml")


def _settings(tmp_path: Path) -> Settings:
    worker = {"runtime_dir": tmp_path / "run", "credentials_dir": tmp_path / "credentials"}
    return Settings.model_validate({"worker": worker})


def test_a_missing_token_names_every_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load_credentials(_settings(tmp_path))
    assert str(tmp_path / "run/credentials/token") in str(caught.value)
    assert str(tmp_path / "credentials/token") in str(caught.value)


def test_a_renewed_token_in_the_runtime_directory_comes_first(tmp_path: Path) -> None:
    for place, token in (("credentials", "old"), ("run/credentials", "new")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "token").write_text(f"{token}\n")
    found = config.load_credentials(_settings(tmp_path))
    assert found.token.get_secret_value() == "new"
    assert "new" not in repr(found)


def test_show_masks_secrets_and_names_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/token").write_text("canary-1234")
    shown = "\n".join(config.show(_settings(tmp_path)))
    assert f"# token = ******** ({tmp_path / 'credentials/token'})" in shown
    assert "canary-1234" not in shown
    assert "poll_wait_s = 25" in shown


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("top secret", "character 4 of 10 is a space or line break"),
        ("tok\nen", "character 4 of 6 is a space or line break"),
        ("token\x07", "character 6 of 6 is U+0007"),
        ("t\u00f6ken", "character 2 of 5 is U+00F6"),
        ("\ufefftoken", "character 1 of 6 is U+FEFF"),
    ],
)
def test_a_token_that_no_header_can_carry_is_refused_unseen(tmp_path: Path, token: str, said: str) -> None:
    (tmp_path / "credentials").mkdir()
    file = tmp_path / "credentials/token"
    file.write_text(token, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        config.load_credentials(_settings(tmp_path))
    assert f"{file}: {said}" in str(caught.value)
    assert token not in str(caught.value)


@pytest.mark.parametrize("key", ["allowed_hosts", "plain_http_hosts"])
@pytest.mark.parametrize(
    "entry",
    [
        "https://files.test",
        "files.test/models",
        "me:canary@files.test",
        "*",
        "a.*.test",
        "::1",
        "x:0",
        "",
        "m\u00fcll.test",
    ],
)
def test_a_host_that_no_url_would_match_is_refused(tmp_path: Path, key: str, entry: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[storage]\n{key} = ["{entry}"]\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"storage\.{key}.*is no host: write host, host:port") as caught:
        config.load(file)
    assert "canary" not in str(caught.value)


def test_every_form_of_a_host_is_taken(tmp_path: Path) -> None:
    entries = [
        "vm100",
        "Files.test:8443",
        "*.cdn.test",
        "192.0.2.7:9000",
        "[FD00::1]",
        "[::1]:9000",
        "a_b.test",
    ]
    file = tmp_path / "config.toml"
    file.write_text(f"[storage]\nallowed_hosts = {entries}\n")
    assert list(config.load(file).storage.allowed_hosts) == entries


def test_an_empty_credential_of_systemds_stands_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit gives each one that is not there as an empty one."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for name in config.CREDENTIAL_FILES.values():
        (tmp_path / name).write_text("\n")
        (tmp_path / name).chmod(0o600)
    settings = Settings.model_validate({"worker": {"runtime_dir": str(tmp_path / "run")}})
    with pytest.raises(
        ConfigError, match=r"no token: as root, write .* into /etc/rvmcv-worker/credentials/token"
    ):
        config.load_credentials(settings)
    (tmp_path / "token").write_text("a-token\n")
    found = config.load_credentials(settings)
    assert (found.token.get_secret_value(), found.s3_access_key) == ("a-token", None)
    elsewhere = Settings.model_validate({"worker": {"credentials_dir": str(tmp_path)}})
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ConfigError, match="s3-access-key: empty"):
        config.load_credentials(elsewhere)
