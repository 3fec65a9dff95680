"""SAM 2.1 checkpoints, ``{"model": state dict, …}``: opened with `weights_only`, told apart by their tensors.

A model is built from one of four configs that the `sam2` package brings along, never from what a file says:
a Hydra config can instantiate any class.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base

from rvmcv_worker.compute import pickle_scan, sam2_metadata
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.compute.sam2_metadata import shown
from rvmcv_worker.errors import ModelInvalidError

#: Architecture -> its config in the `sam2` package.
CONFIGS = {
    "sam2.1_hiera_tiny": "configs/sam2.1/sam2.1_hiera_t.yaml",
    "sam2.1_hiera_small": "configs/sam2.1/sam2.1_hiera_s.yaml",
    "sam2.1_hiera_base_plus": "configs/sam2.1/sam2.1_hiera_b+.yaml",
    "sam2.1_hiera_large": "configs/sam2.1/sam2.1_hiera_l.yaml",
}

#: (width, number of blocks) of the encoder's trunk, in which the four differ.
_TRUNKS = {
    (96, 12): "sam2.1_hiera_tiny",
    (96, 16): "sam2.1_hiera_small",
    (112, 24): "sam2.1_hiera_base_plus",
    (144, 48): "sam2.1_hiera_large",
}
_PATCHES = "image_encoder.trunk.patch_embed.proj.weight"
_BLOCK = re.compile(r"image_encoder\.trunk\.blocks\.(\d+)\.")
_PARTS = (
    "image_encoder.",
    "memory_attention.",
    "memory_encoder.",
    "sam_mask_decoder.",
    "sam_prompt_encoder.",
)
#: What SAM 2.1 has and SAM 2.0 has not.
_SINCE_2_1 = frozenset({"no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias"})

#: What a file of tensors names.
_TENSOR_TYPES = re.compile(
    r"collections\.OrderedDict|torch\.\w+Storage|torch\.Size|torch\._utils\._rebuild_(parameter|tensor_v2)"
)
_EXPECTED = (
    'expected is a SAM 2.1 checkpoint, {"model": state dict}: one of Meta\'s '
    f"({', '.join(CONFIGS)}) or one fine-tuned from it"
)


@dataclass(frozen=True)
class Sam2Checkpoint:
    """What a file holds."""

    #: One of `CONFIGS`.
    architecture: str
    #: Every tensor of the model, finite, on the CPU, mapped from the file.
    weights: dict[str, torch.Tensor]
    #: The other entries: plain values, as whoever wrote the file put them there.
    metadata: dict[str, Any]


def open_sam2(
    path: Path, *, image_px: int | None = None, multimask_fallback: bool | None = None
) -> tuple[SAM2Base, Sam2Checkpoint]:
    """Return the SAM 2.1 model at `path`, in fp32 on the CPU, and what the file says of it.

    How it is to be used (see `build`) is the file's to say, Meta's way where it does not, unless it is given.
    Nothing in the file runs. Raises `ModelInvalidError` for all but such a model, whole and finite.
    """
    checkpoint = read(path)
    wanted = sam2_metadata.served(checkpoint.metadata, path.name)
    model = build(
        checkpoint.architecture,
        image_px=wanted.image_px if image_px is None else image_px,
        multimask_fallback=wanted.multimask_fallback if multimask_fallback is None else multimask_fallback,
    )
    _require_whole(checkpoint, model.state_dict(), path.name)
    model.load_state_dict(checkpoint.weights)
    return model, checkpoint


def build(
    architecture: str,
    *,
    image_px: int = sam2_metadata.IMAGE_PX,
    multimask_fallback: bool = sam2_metadata.MULTIMASK_FALLBACK,
) -> SAM2Base:
    """Return a model of `architecture` with random weights, for evaluation, on the CPU.

    `image_px`, a multiple of 32, is the edge that images are stretched to; it changes no tensor.
    `multimask_fallback`, Meta's default, takes another of the decoder's four masks for a box where the first
    is not stable.
    """
    return build_sam2(
        CONFIGS[architecture],
        device="cpu",
        hydra_overrides_extra=[f"++model.image_size={image_px}"],
        apply_postprocessing=multimask_fallback,
    )


def read(path: Path) -> Sam2Checkpoint:
    """Return what the file at `path` holds, not yet compared with the model tensor by tensor.

    Raises `ModelInvalidError`.
    """
    name = path.name
    pickle_scan.refuse_dangerous(path)
    if others := [kind for kind in pickle_scan.scan(path).types if not _TENSOR_TYPES.fullmatch(kind)]:
        if any(kind.startswith("ultralytics.") for kind in others):
            raise _invalid(name, "is an Ultralytics checkpoint, such as YOLO11's")
        raise _invalid(name, f"holds more than tensors: {_some(sorted(others))}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a stranger's file makes the loader raise is a fault of the file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _invalid(name, f"does not load: {printable(reason)}") from error

    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise _invalid(name, _instead_of_a_checkpoint(content))
    if strange := [key for key, value in weights.items() if not _is_plain(key, value)]:
        raise _invalid(name, f"holds under {printable(str(strange[0]))!r} what is no tensor of floats")
    metadata = {str(key): value for key, value in content.items() if key != "model"}
    architecture = _architecture(weights, name)
    if metadata.get("config", architecture) != architecture:
        raise ModelInvalidError(
            f"{name} says that its config is {shown(metadata['config'])}, but its tensors are "
            f"those of {architecture}; save it with that name, one of {', '.join(CONFIGS)}"
        )
    return Sam2Checkpoint(architecture, weights, metadata)


def _architecture(weights: dict[str, torch.Tensor], name: str) -> str:
    """Tell which of the four it is by the trunk of its encoder."""
    if _PATCHES not in weights:
        raise _invalid(name, _instead_of_sam2(weights))
    width = weights[_PATCHES].shape[0] if weights[_PATCHES].ndim else 0
    blocks = {int(match[1]) for key in weights if (match := _BLOCK.match(key))}
    if architecture := _TRUNKS.get((width, len(blocks))):
        return architecture
    raise _invalid(
        name, f"has an encoder of {len(blocks)} blocks of width {width}, which none of SAM 2.1's four has"
    )


def _require_whole(checkpoint: Sam2Checkpoint, model: dict[str, torch.Tensor], name: str) -> None:
    """Raise `ModelInvalidError` unless it has the model's tensors and no others, of their shapes, finite."""
    weights, architecture = checkpoint.weights, checkpoint.architecture
    missing = [key for key in model if key not in weights]
    if missing and set(missing) <= _SINCE_2_1:
        raise _invalid(name, f"is a SAM 2.0 checkpoint: it has no {missing[0]}")
    if missing:
        raise _invalid(
            name,
            f"is a part of {architecture}: without {len(missing)} of {len(model)} tensors: {_some(missing)}",
        )
    if foreign := [key for key in weights if key not in model]:
        raise _invalid(name, f"holds tensors that {architecture} does not have: {_some(foreign)}")
    for key, wanted in model.items():
        if weights[key].shape != wanted.shape:
            raise _invalid(
                name,
                f"has {key} in the shape {tuple(weights[key].shape)}, "
                f"but {architecture} in {tuple(wanted.shape)}",
            )
    if broken := [key for key, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]:
        raise ModelInvalidError(
            f"{name} holds numbers that are not finite, in {_some(broken)}: its training diverged; "
            "use another checkpoint"
        )


def _is_plain(key: object, value: object) -> bool:
    """Tell whether it is an entry of a state dict that can be looked at: floats, in memory."""
    return (
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.device.type == "cpu"
    )


def _instead_of_a_checkpoint(content: object) -> str:
    """Say what a file without a state dict under "model" is."""
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__}"
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return 'is a bare state dict; save it as torch.save({"model": state_dict}, path)'
    if "model" in content:
        return f'has a {type(content["model"]).__name__} under "model"'
    return f'has no entry "model", but {_some([str(key) for key in content]) or "nothing"}'


def _instead_of_sam2(weights: dict[str, torch.Tensor]) -> str:
    """Say what a state dict without the encoder's first tensor is."""
    if prefixed := next((key for key in weights if key.endswith(f".{_PATCHES}")), None):
        prefix = printable(prefixed.removesuffix(_PATCHES))
        return f"has {prefix!r} before every name, as a wrapped model's state dict; save the one inside"
    if "image_encoder.patch_embed.proj.weight" in weights:
        return "is a checkpoint of the first SAM"
    if parts := [part for part in _PARTS if any(key.startswith(part) for key in weights)]:
        return f"is a part of a SAM2 model: only {', '.join(part.rstrip('.') for part in parts)}"
    return f"is a state dict of something else, with {_some(list(weights)) or 'nothing in it'}"


def _some(keys: list[str]) -> str:
    return ", ".join(printable(key) for key in keys[:3]) + (", …" if len(keys) > 3 else "")


def _invalid(name: str, what: str) -> ModelInvalidError:
    return ModelInvalidError(f"{name} {what}; {_EXPECTED}")
