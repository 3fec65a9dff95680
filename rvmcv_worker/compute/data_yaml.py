"""A data set's own `data.yaml`, read for class names and split hints only, and the one that we write.

Ultralytics runs a stranger's `download:` as code, so it never sees theirs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rvmcv_worker.compute.printable import printable
from rvmcv_worker.errors import DatasetInvalidError

SPLITS = ("train", "val", "test")
_ALIASES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
#: Names that tools give the file; others are looked at after these.
_USUAL_NAMES = ("data", "dataset")
_MAX_CANDIDATES = 50
_MAX_NAMES = 10_000
#: What all class names may take in a report, as JSON.
_MAX_NAMES_BYTES = 100_000
_EMPTY = frozenset({"", "~", "null", "Null", "NULL"})


class _Loader(yaml.BaseLoader):
    """A safe loader that knows only text, lists and mappings: a class called `no` or `1` keeps its name."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*) are not read", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


@dataclass(frozen=True)
class DataYaml:
    """What is taken from a data set's YAML; all of it only hints but the names."""

    #: Path in the archive; "" when there is none.
    file: str = ""
    names: tuple[str, ...] | None = None
    #: The ``path`` key.
    root: str = ""
    #: Split -> the folders it names.
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def folder(self) -> PurePosixPath:
        """Where in the archive the file lies."""
        return PurePosixPath(self.file).parent


def read_data_yaml(unpacked: Path, files: Sequence[str]) -> DataYaml:
    """Return what the data set's YAML says; of several the topmost one with class names or splits.

    Raises `DatasetInvalidError` naming file and line when it is not to be read.
    """
    candidates = sorted(
        (name for name in files if PurePosixPath(name).suffix.lower() in {".yaml", ".yml"}),
        key=lambda name: (name.count("/"), PurePosixPath(name).stem.lower() not in _USUAL_NAMES, name),
    )
    found: DataYaml | None = None
    others = 0
    for name in candidates[:_MAX_CANDIDATES]:
        if found is not None:
            others += 1
            continue
        mapping = _load(unpacked / name, name)
        if isinstance(mapping, dict) and {"names", "nc", "train", "val"} & set(mapping):
            found = _interpret(name, mapping)
    if found is None:
        return DataYaml()
    if others:
        note = f"{printable(found.file)} is used; {others} other YAML file(s) are not read"
        return DataYaml(found.file, found.names, found.root, found.splits, (*found.warnings, note))
    return found


def _load(path: Path, name: str) -> object:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 it makes nothing but text, lists and mappings
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DatasetInvalidError(
            f"{printable(name)}{line} is not YAML: {printable(str(error.problem))}"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DatasetInvalidError(f"{printable(name)} is not YAML: {printable(str(error))}") from error


def _interpret(file: str, mapping: dict[Any, Any]) -> DataYaml:
    warnings: list[str] = []
    names = _names(file, mapping.get("names"))
    count = mapping.get("nc")
    if names is None and isinstance(count, str) and count.isdecimal() and 0 < int(count[:6]) <= _MAX_NAMES:
        names = tuple(f"class_{index}" for index in range(int(count)))
        warnings.append(
            f"{printable(file)} has nc: {count} but no names: the classes are called class_0, class_1, …"
        )
    elif names is not None and isinstance(count, str) and count.strip() != str(len(names)):
        warnings.append(
            f"{printable(file)} says nc: {printable(count, 20)} but names {len(names)} classes, which counts"
        )
    splits: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        for key in _ALIASES[split]:
            value = mapping.get(key)
            folders = value if isinstance(value, list) else [value]
            given = tuple(folder for folder in folders if isinstance(folder, str) and folder not in _EMPTY)
            if given and split not in splits:
                splits[split] = given
    root = mapping.get("path")
    return DataYaml(
        file=file,
        names=names,
        root=root if isinstance(root, str) and root not in _EMPTY else "",
        splits=splits,
        warnings=tuple(warnings),
    )


def _names(file: str, value: object) -> tuple[str, ...] | None:
    """Return the class names in order; raises `DatasetInvalidError` for what is no list of names."""
    if value is None or (isinstance(value, str) and value in _EMPTY):
        return None
    if isinstance(value, dict):
        numbers = [
            int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 8 else -1 for key in value
        ]
        if sorted(numbers) != list(range(len(numbers))):
            raise DatasetInvalidError(
                f"{printable(file)}: classes must be numbered 0 to {len(numbers) - 1}, each once; "
                f"found {printable(', '.join(map(str, value)))}"
            )
        by_number = dict(zip(numbers, value.values(), strict=True))
        value = [by_number[number] for number in sorted(numbers)]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DatasetInvalidError(f"{printable(file)}: names must be a list of class names, or number: name")
    return check_names(value, f"{printable(file)}: names") if value else None


def check_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Return class names fit for reports; raises `DatasetInvalidError` when they are not usable."""
    result = tuple(printable(name.strip(), 100) for name in names)
    if not all(result):
        raise DatasetInvalidError(f"{where}: class {result.index('')} has no name")
    if len(result) > _MAX_NAMES or len(json.dumps(result)) > _MAX_NAMES_BYTES:
        raise DatasetInvalidError(
            f"{where}: {len(result)} class names, which take more than {_MAX_NAMES_BYTES} bytes"
        )
    twice = (
        sorted({name for name in result if result.count(name) > 1}) if len(set(result)) < len(result) else []
    )
    if twice:
        raise DatasetInvalidError(
            f"{where}: '{twice[0]}' is the name of two classes; give each class its own"
        )
    return result


def write_data_yaml(path: Path, data: Path, splits: Sequence[str], names: Sequence[str]) -> None:
    """Write the only `data.yaml` that Ultralytics will see: known keys, `data` absolute."""
    content: dict[str, Any] = {"path": str(data)}
    content.update({split: f"images/{split}" for split in SPLITS if split in splits})
    content["names"] = dict(enumerate(names))
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=False), encoding="ascii")
