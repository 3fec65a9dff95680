"""Which backend runs a model here, and the files it needs: found out once, kept beside the weights.

    exports/<key>/choice.json      what was chosen, and what was measured
    exports/<key>/model.onnx …     the files, each with the sha256 that `choice.json` says

A cache: whatever cannot be read, or has become something else, is removed and found out again. It goes with
the weights that it was made of (`ModelStore.trim`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rvmcv_worker.engine_wire import Backend
from rvmcv_worker.errors import JobCrashedError, ModelUnavailableError
from rvmcv_worker.events import Event, event
from rvmcv_worker.model_store import EXPORTS, copy_hashed
from rvmcv_worker.partial_file import new_file

#: Setting `inference.backend` -> what is tried on a CPU, and on a GPU.
_CANDIDATES = {
    "auto": (("openvino", "onnxruntime", "torch-cpu"), ("tensorrt", "torch-cuda")),
    "torch": (("torch-cpu",), ("torch-cuda",)),
    "openvino": (("openvino",), ("openvino",)),
    "onnxruntime": (("onnxruntime",), ("onnxruntime",)),
    "tensorrt": (("tensorrt",), ("tensorrt",)),
}
#: What decides about speed and numbers of an export besides the model and the device.
_LIBRARIES = ("torch", "ultralytics-opencv-headless", "ultralytics", "openvino", "onnxruntime", "tensorrt")
#: Largest file of an export.
MAX_FILE_BYTES = 2_000_000_000
_MAX_CHOICE_BYTES = 1024 * 1024
_CHOICE = "choice.json"
#: Choices kept of one model, for several image sizes and devices; the oldest goes first.
MAX_OF_A_MODEL = 8
#: What was not finished after so long was left by a daemon that was killed.
_STALE_S = 24 * 3600.0

FileName = Literal["model.onnx", "model.engine"]


def candidates(setting: str, device: str) -> tuple[str, ...]:
    """Return the backends that the setting `inference.backend` asks to try on ``cpu`` or a GPU."""
    return _CANDIDATES[setting][device != "cpu"]


def library_versions() -> dict[str, str]:
    """Return the versions of what runs detectors, as installed; nothing is imported."""
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cpu_name() -> str:
    """Return the CPU's model and how many of its cores there are."""
    names = [platform.processor() or platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or names
    return f"{names[0]}, {len(os.sched_getaffinity(0))} cores"


@dataclass(frozen=True)
class Key:
    """What a choice holds for; with anything else here it is made anew."""

    model_sha256: str
    #: `cpu_name`, or the GPU's name.
    device: str
    #: Edge of the letterboxed image in pixels; None is the model's own.
    imgsz: int | None
    candidates: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=library_versions)

    @property
    def directory_name(self) -> str:
        """The name of its directory, beginning with the model's sha256."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.model_sha256}-{digest[:16]}"


class _Parsed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ExportFile(_Parsed):
    """One file that a backend runs."""

    name: FileName
    size_bytes: Annotated[int, Field(gt=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Chosen(_Parsed):
    """The backend that is fastest among those that say the same as torch in fp32."""

    backend: Literal["torch-cpu", "torch-cuda", "openvino", "onnxruntime", "tensorrt"]
    precision: Literal["fp32", "fp16", "bf16"]


class Choice(_Parsed):
    """What the export child answers, and what is kept of it."""

    chosen: Chosen
    files: Annotated[tuple[ExportFile, ...], Field(max_length=2)]
    #: ``name precision`` -> ``ms``, ``parity``, ``worst`` or ``error``; for people.
    measured: Annotated[dict[str, dict[str, Any]], Field(max_length=20)]
    imgsz: int

    @classmethod
    def parse(cls, found: object) -> Choice:
        """Return what `found`, a child's or the disk's JSON, says; raises `JobCrashedError`."""
        try:
            choice = cls.model_validate(found)
        except ValidationError as error:
            raise JobCrashedError(f"an export's answer is not one: {error}") from None
        if choice.chosen.backend.startswith("torch") != (not choice.files):
            raise JobCrashedError(f"an export for {choice.chosen.backend} has {len(choice.files)} files")
        if len(choice.model_dump_json()) > _MAX_CHOICE_BYTES // 2:
            raise JobCrashedError("an export's answer says more than any measurement could")
        return choice


class ModelExports:
    """A directory of choices, safe for several threads; no file of it is linked into a workspace."""

    def __init__(self, store_directory: Path) -> None:
        self._directory = store_directory / EXPORTS
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def find(self, key: Key) -> Choice | None:
        """Return the choice for `key`; None when none was made, or it cannot be read and is removed."""
        directory = self._directory / key.directory_name
        try:
            with (directory / _CHOICE).open("rb") as file:
                stored = json.loads(file.read(_MAX_CHOICE_BYTES))
            choice = Choice.parse(stored["choice"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, JobCrashedError) as error:
            event(Event.STORE_DAMAGED).warning(
                "model exports: {} cannot be read ({}): removed, it is made again; nothing to do",
                directory,
                error,
            )
            self._remove(directory)
            return None
        return choice

    def save(self, key: Key, choice: Choice, read_back: Callable[[ExportFile], Path | None]) -> None:
        """Keep `choice` and its files, which `read_back` fetches from the child one by one.

        Whole or not at all. Raises `JobCrashedError` for a file that is not what the choice says.
        """
        part = self._directory / f".part-{secrets.token_hex(8)}"
        part.mkdir(mode=0o700)
        try:
            for wanted in choice.files:
                source = read_back(wanted)
                if source is None:
                    raise JobCrashedError(f"the export's {wanted.name} is not there")
                _copy(source, part / wanted.name, wanted)
            stored = {"key": asdict(key), "choice": choice.model_dump(mode="json")}
            with new_file(part / _CHOICE) as file:
                file.write(json.dumps(stored, indent=1, sort_keys=True).encode())
                file.flush()
                os.fsync(file.fileno())
            self._remove(self._directory / key.directory_name)
            self._remove_outdated(key)
            with contextlib.suppress(OSError):  # another thread made the same one: as good
                part.rename(self._directory / key.directory_name)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def place(self, key: Key, choice: Choice, into: Path) -> Backend:
        """Copy the files of a choice that was found into the directory `into` and return the backend.

        Its `path` is where the file lies now; whoever sends it to an engine makes it relative to the engine's
        root. Files that lie there already, of an earlier call, are kept. Raises `ModelUnavailableError` where
        the store's copy is gone or has become something else: the choice is removed.
        """
        directory = self._directory / key.directory_name
        into.mkdir(mode=0o700, parents=True, exist_ok=True)
        for wanted in choice.files:
            dest = into / wanted.name
            if dest.exists():
                continue
            part = into / f".part-{secrets.token_hex(8)}"
            try:
                _copy(directory / wanted.name, part, wanted)
                part.rename(dest)
            except (FileNotFoundError, JobCrashedError) as error:
                self._remove(directory)
                raise ModelUnavailableError(
                    f"the worker's export {wanted.name} of the model {key.model_sha256} is not what it was"
                    f" ({error}); it was removed, and is made again"
                ) from None
            finally:
                part.unlink(missing_ok=True)
        path = str(into / choice.files[0].name) if choice.files else None
        return Backend(choice.chosen.backend, choice.chosen.precision, path)

    def forget(self, key: Key) -> None:
        """Remove the choice for `key`, if there is one."""
        self._remove(self._directory / key.directory_name)

    def _remove_outdated(self, key: Key) -> None:
        """Make room for one more: what other libraries made, is too much, or was never finished goes."""
        kept = []
        for directory in self._directory.glob(f"{key.model_sha256}-*"):
            try:
                stored = json.loads((directory / _CHOICE).read_bytes())["key"]["versions"]
                made_s = (directory / _CHOICE).stat().st_mtime
            except (OSError, ValueError, KeyError, TypeError):
                stored, made_s = None, 0.0
            if stored == key.versions:
                kept.append((made_s, directory))
            else:
                self._remove(directory)
        for _, directory in sorted(kept, reverse=True)[MAX_OF_A_MODEL - 1 :]:
            self._remove(directory)
        for directory in self._directory.glob(".*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - directory.stat().st_mtime > _STALE_S:
                    shutil.rmtree(directory, ignore_errors=True)

    def _remove(self, directory: Path) -> None:
        """Take a directory out of sight at once, then remove it."""
        away = self._directory / f".gone-{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            directory.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def _copy(source: Path, dest: Path, wanted: ExportFile) -> None:
    """Copy a file, and raise `JobCrashedError` unless it has the hash that it should."""
    with source.open("rb") as original, new_file(dest) as target:
        found = copy_hashed(original, target)
        if found != wanted.sha256:
            raise JobCrashedError(f"{wanted.name} has the sha256 {found}, not {wanted.sha256}")
        target.flush()
        os.fsync(target.fileno())
