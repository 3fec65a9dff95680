"""One frozen configuration object, read from `config.toml`; secrets come from files of their own.

Every default stands here and nowhere else; `config.toml` at the top of the repository shows them
all with comments, and a test proves the two equal. An unknown key is refused with the nearest known
name. Nothing is read from the environment but systemd's own directories.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from rvmcv_worker import secret_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Slots = Annotated[int, Field(ge=1, le=64)]
#: A model as RVM-Server calls it: a version, a file name or a sha256; never a path.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

#: A host of which files may come, perhaps a pattern for all beneath it, perhaps with a port.
_HOST_ENTRY = re.compile(
    r"(?i)((\*\.)?[a-z0-9]([a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]{2,45}\])(:[1-9][0-9]{0,4})?"
)

#: Job types that the inference engine serves.
INFERENCE_JOB_TYPES = frozenset({"inference", "batch-inference"})


class ConfigError(Exception):
    """The configuration cannot be used; the message names file, key and what to do."""


class Section(BaseModel):
    """A table of `config.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ServerSettings(Section):
    """Where RVM-Server is and how patient to be with it."""

    url: str = "https://vm100"
    ca_file: Path | None = None
    proxy: str | None = None
    connect_timeout_s: PositiveFloat = 5.0
    read_timeout_s: PositiveFloat = 30.0
    poll_wait_s: Annotated[int, Field(ge=0, le=30)] = 25

    @field_validator("url")
    @classmethod
    def _origin_only(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"https", "http"} or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError("must be http(s)://host[:port], without user or query")
        return value.rstrip("/")

    @field_validator("proxy")
    @classmethod
    def _proxy_without_login(cls, value: str | None) -> str | None:
        if value is not None and "@" in value:
            raise ValueError(
                "must be without user and password: secrets do not belong into this file; have the proxy let"
                " this machine through by its address, or name a forwarder on it that logs in"
            )
        return value

    @property
    def base_url(self) -> str:
        """The root of the worker's API."""
        return f"{self.url}/api/v1/cv"


class WorkerSettings(Section):
    """Who this worker is, what it takes on, and where it keeps its things."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "vm102"
    job_types: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "yolo11",
        "sam2",
        "inference",
        "batch-inference",
    )
    state_dir: Path = Path("/var/lib/rvmcv-worker")
    runtime_dir: Path = Path("/run/rvmcv-worker")
    credentials_dir: Path | None = None
    gpu: Literal["auto", "required", "none"] = "auto"
    train_slots: Literal["per-gpu"] | Slots = "per-gpu"
    infer_slots: Slots = 8
    batch_slots: Slots = 1
    checkpoint_every_min: PositiveFloat = 10.0
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    metrics_file: Path | None = None

    @field_validator("metrics_file")
    @classmethod
    def _for_node_exporter(cls, value: Path | None) -> Path | None:
        if value is not None and not (value.is_absolute() and value.suffix == ".prom"):
            raise ValueError("must be an absolute path that ends in .prom: node_exporter reads no other file")
        return value


class SandboxSettings(Section):
    """The wall around every child."""

    mode: Literal["required", "auto"] = "required"
    extra_read_only: tuple[Path, ...] = ()


class StorageSettings(Section):
    """Object storage and the hosts that files may come from."""

    s3_endpoint: str | None = None
    s3_region: str = "us-east-1"
    s3_bucket: str = "models"
    allowed_hosts: tuple[str, ...] = ()
    plain_http_hosts: tuple[str, ...] = ()

    @field_validator("s3_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if (
            parts.scheme not in {"https", "http"}
            or not parts.hostname
            or "@" in parts.netloc
            or parts.path.strip("/")
        ):
            raise ValueError("must be http(s)://host[:port]")
        return value.rstrip("/")

    @field_validator("allowed_hosts", "plain_http_hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """An entry that no URL ever matches would look like a host that is allowed."""
        if wrong := [entry for entry in value if not _HOST_ENTRY.fullmatch(entry)]:
            shown = ascii(wrong[0].rpartition("@")[2])
            raise ValueError(
                f"{shown} is no host: write host, host:port, *.domain or [IPv6], without scheme and path"
            )
        return value


class LimitSettings(Section):
    """What one job may take; over it, the job ends with its own error code."""

    max_job_h: PositiveFloat = 72.0
    max_prepare_s: PositiveFloat = 3600.0
    max_job_memory_gb: PositiveFloat = 60.0
    max_gpu_memory_gb: PositiveFloat = 22.0
    engine_gpu_memory_gb: NotNegativeFloat = 3.0
    max_gpu_temperature_c: PositiveFloat = 90.0
    max_gpu_ecc_errors: Annotated[int, Field(ge=0)] = 0
    max_workspace_gb: PositiveFloat = 100.0
    workspace_high_water: Annotated[float, Field(gt=0, le=1)] = 0.8
    disk_floor_gb: PositiveFloat = 10.0
    disk_floor_files: Annotated[int, Field(ge=0)] = 10_000
    max_log_mb: PositiveFloat = 64.0
    max_dataset_gb: PositiveFloat = 40.0
    max_model_mb: PositiveFloat = 2000.0
    max_archive_entries: Annotated[int, Field(ge=1)] = 500_000
    max_archive_ratio: Annotated[float, Field(ge=1)] = 200.0
    max_image_megapixels: PositiveFloat = 100.0
    model_store_gb: PositiveFloat = 40.0
    term_grace_s: PositiveFloat = 20.0
    cancel_grace_s: PositiveFloat = 1.5


class InferenceSettings(Section):
    """The engine, and what a job leaves unsaid."""

    backend: Literal["auto", "torch", "openvino", "onnxruntime", "tensorrt"] = "auto"
    segmenter: str = "sam2.1_hiera_tiny"
    engine_idle_s: PositiveFloat = 600.0
    engine_memory_gb: PositiveFloat = 8.0
    infer_timeout_s: PositiveFloat = 60.0
    load_timeout_s: PositiveFloat = 180.0
    batch_window_ms: NotNegativeFloat = 3.0
    max_batch: Annotated[int, Field(ge=1, le=256)] = 16
    embedding_cache_mb: NotNegativeFloat = 512.0
    max_image_mb: PositiveFloat = 64.0
    max_manifest_mb: PositiveFloat = 1000.0
    download_threads: Annotated[int, Field(ge=1, le=64)] = 8
    compare_iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    compare_confidence: Annotated[float, Field(gt=0, le=1)] = 0.3


class DatasetSettings(Section):
    """When a data set is good enough to train on."""

    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2


#: Public sha256 of base models, by name; `[models.pinned]` adds to these.
PINNED = {"yolo11n.pt": "0ebbc80d4a7680d14987a577cd21342b65ecfd94632bd9a8da63ae6417644ee1"}

#: In lower case; empty for a name that stands for any bytes.
Pin = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class ModelSettings(Section):
    """Which bytes well-known names stand for, whoever serves them."""

    pinned: dict[ModelName, Pin] = PINNED

    @field_validator("pinned", mode="before")
    @classmethod
    def _beside_the_defaults(cls, value: Any) -> Any:
        """A pin for one model takes no other away: that would go unnoticed."""
        if not isinstance(value, dict):
            return value
        of_defaults = {_as_pinned(name): name for name in PINNED}
        given = {
            of_defaults.get(_as_pinned(str(name)), name): sha256.lower()
            if isinstance(sha256, str)
            else sha256
            for name, sha256 in value.items()
        }
        return {**PINNED, **given}

    def sha256_of(self, name: str) -> str | None:
        """Return what a model of that name has to be; None for a name that is not pinned.

        RVM-Server's database may take names for equal that differ in case, and a file's ending is
        often left out: no spelling of a pinned name leads past its pin.
        """
        by_name = {_as_pinned(pinned): sha256 for pinned, sha256 in self.pinned.items()}
        return by_name.get(_as_pinned(name)) or None


def _as_pinned(name: str) -> str:
    return name.lower().removesuffix(".pt")


class TimingSettings(Section):
    """One factor for every waiting time: 1 in production, less in tests."""

    scale: PositiveFloat = 1.0


class Settings(Section):
    """Everything that `config.toml` can say."""

    server: ServerSettings = ServerSettings()
    worker: WorkerSettings = WorkerSettings()
    sandbox: SandboxSettings = SandboxSettings()
    storage: StorageSettings = StorageSettings()
    limits: LimitSettings = LimitSettings()
    dataset: DatasetSettings = DatasetSettings()
    inference: InferenceSettings = InferenceSettings()
    models: ModelSettings = ModelSettings()
    timing: TimingSettings = TimingSettings()

    @model_validator(mode="after")
    def _engine_leaves_something(self) -> Settings:
        if self.job_gpu_memory_bytes <= 0:
            raise ValueError(
                "limits.engine_gpu_memory_gb must be less than max_gpu_memory_gb, whose part it is"
            )
        return self

    def scaled(self, seconds: float) -> float:
        """Return a waiting time as `[timing] scale` makes it."""
        return seconds * self.timing.scale

    @property
    def job_gpu_memory_bytes(self) -> int:
        """What one job may take of a GPU's memory: the limit, less the engine's part where there is one."""
        serves = not INFERENCE_JOB_TYPES.isdisjoint(self.worker.job_types)
        engine_gb = self.limits.engine_gpu_memory_gb if serves else 0.0
        return int((self.limits.max_gpu_memory_gb - engine_gb) * 1024**3)

    @property
    def work_dir(self) -> Path:
        """Where the workspaces of jobs are made."""
        return self.worker.state_dir / "work"

    @property
    def secret_dirs(self) -> tuple[Path, ...]:
        """What no child may see, even where it lies beneath something that it may."""
        worker = self.worker
        directories = (worker.state_dir, worker.runtime_dir, worker.credentials_dir)
        return tuple(directory for directory in directories if directory is not None)

    @property
    def model_store_dir(self) -> Path:
        """Weights by sha256: a cache, never a source of truth."""
        return self.worker.state_dir / "models"


class Credentials(BaseModel):
    """The secrets, each from a file of its own; masked wherever they are printed."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    token: SecretStr
    s3_access_key: SecretStr | None = None
    s3_secret_key: SecretStr | None = None


#: File names in the runtime or credentials directory, by field of `Credentials`.
CREDENTIAL_FILES = {"token": "token", "s3_access_key": "s3-access-key", "s3_secret_key": "s3-secret-key"}
#: What of the configuration speaking to RVM-Server takes, by section.
_TO_SPEAK = {
    "server": {"url", "ca_file", "proxy"},
    "worker": {"id", "state_dir", "runtime_dir", "credentials_dir"},
}
#: Where in the runtime directory a secret lies that was renewed while the worker runs.
HANDED_OVER = "credentials"
#: Where the installed service keeps the secrets that systemd hands it: see systemd/rvmcv-worker.service.
INSTALLED_CREDENTIALS = Path("/etc/rvmcv-worker/credentials")
#: What somebody would call a secret in `config.toml`.
_SECRET_KEY = re.compile(r"(?i)token|secret|passw|credential|(access|api|private)[_-]?key")


def _explain(error: ValidationError, file: Path) -> str:
    lines = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden" and _SECRET_KEY.search(str(item["loc"][-1])):
            names = ", ".join(CREDENTIAL_FILES.values())
            lines.append(
                f"{file}: {key}: secrets do not belong here: write each alone into a file ({names}; mode "
                "0600) in <runtime_dir>/credentials or credentials_dir, or use systemd's LoadCredential="
            )
        elif item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(item["loc"][:-1]), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            lines.append(f"{file}: unknown key {key!r}{hint}")
        else:
            lines.append(f"{file}: {key and f'{key}: '}{item['msg']}")
    return "\n".join(lines)


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)


def load(file: Path) -> Settings:
    """Read `file`; raises `ConfigError` naming file, key and line."""
    data = _read(file)
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, file)) from None


def load_to_speak(file: Path) -> Settings:
    """Read of `file` what speaking to RVM-Server takes, with defaults for what is wrong elsewhere.

    Raises `ConfigError` where what is wrong is among that: a default could lead the token to a stranger.
    """
    data = _read(file)
    sections = {name: data[name] for name in _TO_SPEAK if isinstance(data.get(name), dict)}
    spoken = {
        section: {key: value for key, value in values.items() if key in _TO_SPEAK[section]}
        for section, values in sections.items()
    }
    try:
        return Settings.model_validate(spoken)
    except ValidationError as error:
        raise ConfigError(_explain(error, file)) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such file; copy config.toml there or name another by --config"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None


def _credential_dirs(settings: Settings) -> list[Path]:
    """Where secrets are looked for, first hit wins: a token renewed while running, then the unit's."""
    found = [settings.worker.runtime_dir / HANDED_OVER]
    if settings.worker.credentials_dir:
        found.append(settings.worker.credentials_dir)
    if systemd := _systemd_dir():
        found.append(systemd)
    return found


def _systemd_dir() -> Path | None:
    """Where systemd's LoadCredential= puts secrets; None when it has started nothing of this."""
    named = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(named) if named else None


def load_credentials(settings: Settings) -> Credentials:
    """Read the secrets; raises `ConfigError` when there is no token, or a secret that cannot be used."""
    values: dict[str, str] = {}
    directories, systemd = _credential_dirs(settings), _systemd_dir()
    try:
        for field, name in CREDENTIAL_FILES.items():
            # systemd has no optional credential: the unit has an empty one stand for none.
            found = (
                secret_file.read(directory / name, empty_is_none=directory == systemd)
                for directory in directories
            )
            if (secret := next((each for each in found if each is not None), None)) is not None:
                values[field] = secret
        secret_file.refuse_in_environment(value for key, value in values.items() if key != "s3_access_key")
    except secret_file.SecretFileError as error:
        raise ConfigError(str(error)) from None
    if "token" not in values and systemd:
        raise ConfigError(
            f"no token: as root, write RVM-Server's worker token into {INSTALLED_CREDENTIALS / 'token'} "
            "(mode 0600), then: systemctl reset-failed rvmcv-worker; systemctl restart rvmcv-worker"
        )
    if "token" not in values:
        places = ", ".join(str(directory / "token") for directory in directories)
        raise ConfigError(f"no token: put RVM-Server's worker token into one of {places} (mode 0600)")
    if ("s3_access_key" in values) != ("s3_secret_key" in values):
        there, lacking = sorted(("s3_access_key", "s3_secret_key"), key=lambda field: field not in values)
        raise ConfigError(
            f"MinIO's keys come as a pair: there is a file {CREDENTIAL_FILES[there]}, and no "
            f"{CREDENTIAL_FILES[lacking]}; add it, or remove the other"
        )
    return Credentials.model_validate(values)


def credential_file(settings: Settings, name: str) -> Path | None:
    """Return the file that the secret `name` is read from now, or None where there is none."""
    files = (directory / name for directory in _credential_dirs(settings))
    return next((file for file in files if file.exists()), None)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, default=str)


def show(settings: Settings) -> list[str]:
    """Return the values in force as TOML lines, and where each secret comes from, masked."""
    lines = []
    for section, model in settings:
        lines.append(f"[{section}]")
        for key, value in model:
            shown = "(not set)" if value is None else _toml(value)
            lines.append(f"{'# ' if value is None else ''}{key} = {shown}")
        lines.append("")
    lines.append("# secrets")
    for name in CREDENTIAL_FILES.values():
        found = credential_file(settings, name)
        lines.append(f"# {name} = {f'******** ({found})' if found else '(not set)'}")
    return lines
