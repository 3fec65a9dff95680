"""Where a data set keeps its images, labels and splits: YOLO's layouts as people have them.

Works on names alone. An image's label is looked for where Ultralytics does, then where people put it; its
split is what `data.yaml` says where that leads to a folder of the archive, else what a folder's name says.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from rvmcv_worker.compute.archive import IMAGE_SUFFIXES
from rvmcv_worker.compute.data_yaml import SPLITS, DataYaml
from rvmcv_worker.compute.printable import printable

Parts = tuple[str, ...]

_SPLIT_WORD = re.compile(
    r"^(train|training|val|valid|validation|test|testing)(?:[-_ ]?(?:set|data|split)?[-_ ]?\d*)$"
)
_SPLIT_OF = {"tra": "train", "val": "val", "tes": "test"}
_IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages"})
_LABEL_FOLDERS = ("labels", "label")
#: Text files that tools put beside the labels.
_NO_LABEL = re.compile(
    r"^(classes|obj|labels|notes|requirements|license|readme.*|train|val|valid|test)$", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Item:
    """One image of one split."""

    #: Paths in the archive; a missing label file makes the image background.
    image: str
    label: str | None
    #: Path below ``images/<split>/``, in the same order as the originals.
    target: str

    @property
    def label_target(self) -> str:
        """Path below ``labels/<split>/``."""
        return self.target.rpartition(".")[0] + ".txt"


@dataclass(frozen=True)
class Layout:
    """Which image goes where."""

    #: The splits found: train alone when the data set has none.
    splits: dict[str, tuple[Item, ...]]
    #: For people: ``train: train/images; val: valid/images``.
    description: str
    warnings: tuple[str, ...]
    #: Images that the labels name and the archive does not have.
    missing: int = 0


def plan(files: Sequence[str], hints: DataYaml) -> Layout:
    """Return the layout of the data set whose files are named in `files`."""
    images = sorted(name for name in files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES)
    texts = {_key(name): name for name in files if name.lower().endswith(".txt")}
    warnings: list[str] = []
    sources: dict[str, list[tuple[Parts, str]]] = defaultdict(list)  # split -> (folder, image)
    named = _by_hints(images, hints, warnings)
    for split, folders in named.items():
        taken: set[str] = set()
        for folder in folders:
            for image in images:
                if image not in taken and parts_of(image)[: len(folder)] == folder:
                    taken.add(image)
                    sources[split].append((folder, image))
    assigned = {image for found in sources.values() for _, image in found}
    unassigned = []
    for image in images:
        if image in assigned:
            continue
        split, folder = by_folder(parts_of(image))
        if split and split not in named:
            sources[split].append((folder, image))
        else:
            unassigned.append(image)
    if not sources or (set(sources) == {"test"} and unassigned):
        folder = common_folder(unassigned)
        sources["train"] = [(folder, image) for image in unassigned]
        unassigned = []
    if unassigned:
        warnings.append(
            f"{len(unassigned)} image(s) outside the splits are not used, as '{printable(unassigned[0])}'"
        )

    def label_of(image: str) -> str | None:
        return next((texts[key] for key in _label_keys(image) if key in texts), None)

    splits = {split: items_of(sources[split], label_of) for split in SPLITS if split in sources}
    warnings += _orphans(texts, splits)
    described = []
    for split in splits:
        shown = sorted({printable("/".join(folder)) or "." for folder, _ in sources[split]})
        described.append(f"{split}: {' + '.join(shown[:5])}")
    return Layout(splits=splits, description="; ".join(described), warnings=tuple(warnings))


def parts_of(path: str) -> Parts:
    """Return the components of a path in the archive."""
    return tuple(path.split("/"))


def _key(path: str) -> str:
    """Return what an image and its label have in common."""
    return path.rpartition(".")[0].casefold()


def split_of(folder: str) -> str:
    """Return the split that a folder is called after, or ""."""
    match = _SPLIT_WORD.match(folder.lower())
    return _SPLIT_OF[match.group(1)[:3]] if match else ""


def by_folder(image: Parts) -> tuple[str, Parts]:
    """Return (split, folder) by the innermost folder that is called after a split; ("", ()) without one."""
    for end in range(len(image) - 1, 0, -1):
        if split := split_of(image[end - 1]):
            inner = end < len(image) - 1 and image[end].lower() in _IMAGE_FOLDERS
            return split, image[: end + 1] if inner else image[:end]
    return "", ()


def common_folder(images: Sequence[str]) -> Parts:
    """Return the innermost folder that all the images lie in."""
    common = parts_of(images[0])[:-1] if images else ()
    for image in images:
        parts = parts_of(image)
        while parts[: len(common)] != common:
            common = common[:-1]
    return common


def _by_hints(images: Sequence[str], hints: DataYaml, warnings: list[str]) -> dict[str, tuple[Parts, ...]]:
    """Return the folders of each split that `data.yaml` names and the archive has."""
    folders: dict[Parts, Parts] = {}  # folded -> as written, each folder with an image somewhere below it
    for image in images:
        parts = parts_of(image)
        for end in range(len(parts)):
            folders.setdefault(folded(parts[:end]), parts[:end])
    result: dict[str, tuple[Parts, ...]] = {}
    for split, entries in hints.splits.items():
        resolved = [_resolve(entry, hints, folders) for entry in entries]
        found = tuple(dict.fromkeys(folder for folder in resolved if folder is not None))
        missing = [entry for entry, folder in zip(entries, resolved, strict=True) if folder is None]
        if missing:
            kind = (
                "lists of images are not read"
                if missing[0].endswith(".txt")
                else "the archive has no such folder"
            )
            warnings.append(f"{printable(hints.file)} names '{printable(missing[0])}' for {split}: {kind}")
        if found:
            result[split] = found
    return result


def folded(parts: Sequence[str]) -> Parts:
    """Return the components of a path without regard to case."""
    return tuple(part.casefold() for part in parts)


def plain_parts(path: str) -> Parts:
    """Return the components of a path as people's files have it, of any system, without drive and dots."""
    without_drive = re.sub(r"^[A-Za-z]:", "", path.strip().replace("\\", "/"))
    return folded([part for part in without_drive.split("/") if part not in {"", ".", ".."}])


def _resolve(entry: str, hints: DataYaml, folders: dict[Parts, Parts]) -> Parts | None:
    """Return the archive's folder that a YAML's entry means, or None."""
    root, relative = plain_parts(hints.root), plain_parts(entry)
    here = folded([part for part in hints.folder.parts if part != "."])
    for base in (here, here[:-1], ()):
        for candidate in (base + root + relative, base + relative):
            if candidate in folders:
                return folders[candidate]
    # Elsewhere on somebody's disk: the longest end of the path that a folder of the archive ends with.
    whole = root + relative
    for length in range(len(whole), 0, -1):
        end = whole[-length:]
        if length == 1 and not split_of(end[0]):
            break  # `images` alone would be anyone's
        matches = sorted((folder for folder in folders if folder[-length:] == end), key=len)
        if matches and (len(matches) == 1 or len(matches[0]) < len(matches[1])):
            return folders[matches[0]]
    return None


def _label_keys(image: str) -> Iterator[str]:
    """Yield where an image's label may lie, as keys, Ultralytics' own places first."""
    *folder, stem = parts_of(_key(image))
    for index in range(len(folder) - 1, -1, -1):
        if folder[index] in _IMAGE_FOLDERS:
            for name in _LABEL_FOLDERS:
                yield "/".join([*folder[:index], name, *folder[index + 1 :], stem])
            break
    yield "/".join([*folder, stem])
    for name in _LABEL_FOLDERS:
        yield "/".join([*folder, name, stem])
        yield "/".join([*folder[:-1], name, *folder[-1:], stem])
        yield "/".join([*folder[:-1], name, stem])


def items_of(found: Sequence[tuple[Parts, str]], label_of: Callable[[str], str | None]) -> tuple[Item, ...]:
    """Return the items of a split, given (folder, image) and the label file of an image.

    Images of several folders get a numbered folder each, in their order.
    """
    folders = sorted({folder for folder, _ in found}, key=lambda folder: "/".join([*folder, ""]))
    items = []
    used: set[str] = set()
    for folder, image in found:
        below = list(parts_of(image)[len(folder) :])
        # Ultralytics finds labels by the last folder called `images`: there must be none but ours.
        below[:-1] = [part + "_" if part == "images" else part for part in below[:-1]]
        prefix = [f"{folders.index(folder):02d}"] if len(folders) > 1 else []
        while "/".join([*prefix, *below]) in used:
            below[-1] = "_" + below[-1]
        target = "/".join([*prefix, *below])
        used.add(target)
        items.append(Item(image=image, label=label_of(image), target=target))
    return tuple(sorted(items, key=lambda item: item.target))


def _orphans(texts: dict[str, str], splits: dict[str, tuple[Item, ...]]) -> list[str]:
    """Return a warning about label files whose image is missing."""
    used = {item.label for items in splits.values() for item in items if item.label}
    folders = {str(PurePosixPath(label).parent) for label in used}
    orphans = [
        name
        for name in sorted(set(texts.values()) - used)
        if str(PurePosixPath(name).parent) in folders and not _NO_LABEL.match(PurePosixPath(name).stem)
    ]
    return [f"{len(orphans)} label file(s) without an image, as '{printable(orphans[0])}'"] if orphans else []
