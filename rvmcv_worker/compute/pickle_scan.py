"""What a checkpoint's pickle names, read without running any of it and without torch.

A `.pt` is a zip archive with one pickle, `data.pkl`, beside the tensors' raw bytes. A pickle runs code
only through the callables that it names, so their list tells whether it is a checkpoint or an attack.
"""

from __future__ import annotations

import _compat_pickle
import errno
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rvmcv_worker.errors import ModelInvalidError

#: Largest pickle that is read; a YOLO11x has 0.5 MB beside its tensors.
MAX_PICKLE_BYTES = 64 * 1024 * 1024

#: What `zipfile` and `pickletools` raise for bytes that are wrong: EINVAL is a place before the file's
#: beginning, RuntimeError an entry that says that it is encrypted.
_DAMAGED = (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, OSError, struct.error, OverflowError)

#: All that a YOLO11 training of ours names: model classes, tensors, plain containers.
YOLO11_TYPES = frozenset(
    {
        "builtins.set",
        "collections.OrderedDict",
        "torch.FloatStorage",
        "torch.HalfStorage",
        "torch.LongStorage",
        "torch.Size",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        *(
            f"torch.nn.modules.{name}"
            for name in (
                "activation.SiLU",
                "batchnorm.BatchNorm2d",
                "container.ModuleList",
                "container.Sequential",
                "conv.Conv2d",
                "conv.ConvTranspose2d",
                "linear.Identity",
                "pooling.MaxPool2d",
                "upsampling.Upsample",
            )
        ),
        *(
            f"ultralytics.nn.modules.block.{name}"
            for name in (
                "Attention",
                "Bottleneck",
                "C2PSA",
                "C3k",
                "C3k2",
                "DFL",
                "PSABlock",
                "Proto",
                "SPPF",
            )
        ),
        *(f"ultralytics.nn.modules.conv.{name}" for name in ("Concat", "Conv", "DWConv")),
        *(f"ultralytics.nn.modules.head.{name}" for name in ("Detect", "Segment")),
        *(f"ultralytics.nn.tasks.{name}" for name in ("DetectionModel", "SegmentationModel")),
    }
)

#: All that a SAM2 training of ours names: tensors of floats.
SAM2_TYPES = frozenset({"collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"})

# What checkpoints made elsewhere name besides: other layers, NumPy numbers, settings, paths. Loading with
# weights_only decides about these one by one; this only tells an attack from a checkpoint of another kind.
_FAMILIAR = re.compile(
    r"""(torch|torch\._utils|torch\.nn\.modules(\.\w+)?|torch\.nn\.parameter|ultralytics\.nn\.\w+(\.\w+)?"""
    r"""|ultralytics\.utils(\.loss|\.tal)?|numpy(\.(_core|core)\.multiarray)?|pathlib(\._local)?)\.\w+"""
    r"""|_codecs\.encode|builtins\.(getattr|set|bytearray|slice)|collections\.OrderedDict"""
)

# Opcodes that fetch a callable in ways that hide its name; torch.save writes none of them.
_HIDDEN_NAMES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID"})
_ENTRY = re.compile(
    r"[^/]+/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+)"
)
_LOCAL_PATH = re.compile(r"^(/|~|[A-Za-z]:[\\/]|\\\\|file:)|/(home|root|Users|job|tmp|var|mnt|srv|opt|etc)/")


@dataclass(frozen=True)
class PickleNames:
    """The callables and the text in a checkpoint's pickle."""

    types: frozenset[str]  #: "module.name" of each
    strings: frozenset[str]

    @property
    def dangerous(self) -> list[str]:
        """Callables that no checkpoint needs."""
        return sorted(name for name in self.types if not _FAMILIAR.fullmatch(name))

    def beyond(self, types: frozenset[str]) -> list[str]:
        """Return the callables that are none of `types`."""
        return sorted(self.types - types)

    @property
    def local_paths(self) -> list[str]:
        """Text that looks like a path of the machine the checkpoint was made on."""
        return sorted(text for text in self.strings if _LOCAL_PATH.search(text))


def refuse_dangerous(path: Path) -> None:
    """Raise `ModelInvalidError` for what is not a checkpoint, or one that would run code when opened."""
    if dangerous := scan(path).dangerous:
        raise ModelInvalidError(
            f"{path.name} would run code when opened: its pickle names {', '.join(dangerous[:5])}, "
            "which no checkpoint needs; do not use this file, and find out where it came from"
        )


def scan(path: Path) -> PickleNames:
    """Return what the checkpoint at `path` names; raise `ModelInvalidError` when it is not one."""
    name = path.name
    if not path.is_file():
        raise ModelInvalidError(f"{name} is not a file; name a model that RVM-Server or the store has")
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                raise ModelInvalidError(
                    f"{name} is not a checkpoint: a .pt is a zip archive and this does not begin like one; "
                    "upload the best.pt that a training wrote"
                )
            with zipfile.ZipFile(stream) as archive:
                text = _pickle_bytes(archive, name)
        types, strings = set(), set()
        for opcode, argument, _ in pickletools.genops(text):
            if opcode.name in _HIDDEN_NAMES:
                raise ModelInvalidError(f"{name} was not written by torch.save: its pickle has {opcode.name}")
            if opcode.name == "GLOBAL":
                types.add(_today(*str(argument).split(" ", 1)))
            elif isinstance(argument, str):
                strings.add(argument)
            elif isinstance(argument, bytes):
                strings.add(argument.decode(errors="replace"))
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno not in {None, errno.EINVAL}:
            raise  # the machine's fault, not the file's
        raise ModelInvalidError(
            f"{name} is truncated or damaged ({error}); upload it again and compare its sha256"
        ) from None
    return PickleNames(frozenset(types), frozenset(strings))


def _pickle_bytes(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return `data.pkl`, refusing archives in which two readers could find different ones."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    strange = [entry for entry in names if not _ENTRY.fullmatch(entry)]
    folders = {entry.split("/")[0] for entry in names}
    if strange or len(pickles) != 1 or len(folders) != 1 or len(set(names)) != len(names):
        raise ModelInvalidError(
            f"{name} is a zip archive but not a checkpoint"
            + (f": it holds {strange[0]!r}" if strange else ": it must hold one data.pkl and nothing twice")
            + "; upload the best.pt that a training wrote (not an export, not a data set)"
        )
    if archive.comment or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ModelInvalidError(f"{name} was not written by torch.save: it is compressed or has a comment")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise ModelInvalidError(f"{name} has a pickle of over {MAX_PICKLE_BYTES} bytes")
    return archive.read(pickles[0])


def _today(module: str, attribute: str) -> str:
    """Return the Python 3 name of what protocol 2 names as Python 2 did."""
    if (module, attribute) in _compat_pickle.NAME_MAPPING:
        module, attribute = _compat_pickle.NAME_MAPPING[module, attribute]
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{attribute}"
