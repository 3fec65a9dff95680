"""SAM2 as it is trained on images: which of it learns, and its three stages.

square -> frozen output (kept in a cache) -> features -> masks. What is not trained lies in the first stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from rvmcv_worker.sam2_options import Trained

_HALF_MAX = torch.finfo(torch.float16).max


class Features(NamedTuple):
    """What the mask decoder takes of n images; edge = image_px / 16."""

    #: (n, 256, edge, edge)
    image: Tensor
    #: (n, 32, 4 edge, 4 edge)
    fine: Tensor
    #: (n, 64, 2 edge, 2 edge)
    middle: Tensor


class Prompts(NamedTuple):
    """What m objects are asked for with."""

    #: (m, k, 2) x, y in pixels of the square.
    points: Tensor
    #: (m, k) int32: 1 on the object, 0 beside it, 2 and 3 a box's corners, -1 no point.
    kinds: Tensor
    #: (m, 1, 4 edge, 4 edge) of the mask so far.
    logits: Tensor | None = None


class Decoded(NamedTuple):
    """Masks of m objects, c = 3 with multimask, else 1; all float32."""

    #: (m, c, 4 edge, 4 edge)
    logits: Tensor
    #: (m, c) predicted
    ious: Tensor
    #: (m, 1) logit
    object_score: Tensor


class Network:
    """A SAM2 model on a device, frozen but for what is trained."""

    def __init__(self, model: SAM2Base, trained: Trained, device: torch.device) -> None:
        self.model = model.to(device).requires_grad_(False)
        self.device = device
        self.image_px: int = model.image_size
        self._trained: Trained = trained
        self._bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        for parameter in self.trained_parameters().values():
            parameter.requires_grad_(True)
        with torch.no_grad():
            self._positions = model.sam_prompt_encoder.get_dense_pe()
        _lay_out(model.sam_mask_decoder, self._positions)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return those that learn, by their names in the model."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if _is_trained(name, self._trained)
        }

    def train(self) -> None:
        """Decode as a training does: no stabler mask is taken in place of a box's own."""
        self.model.train()

    def eval(self) -> None:
        """Decode as the model is served."""
        self.model.eval()

    @torch.no_grad()  # what is made in inference mode could not be saved for a backward pass
    def frozen(self, squares: Tensor) -> tuple[Tensor, ...]:
        """Return what never changes in this training, float16 in the shapes of `frozen_shapes`.

        `squares`: (n, 3, image_px, image_px), normalised; returned as they are where everything is trained.
        """
        squares = squares.to(self.device)
        if self._trained == "all":
            return (squares,)
        with self._autocast():
            levels = self.model.image_encoder.trunk(squares)
            outputs = levels if self._trained == "decoder+neck" else self._to_decoder(levels)
        return tuple(
            output.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16, memory_format=torch.contiguous_format)
            for output in outputs
        )

    def features(self, frozen: Sequence[Tensor]) -> Features:
        """Return the features, with a gradient where something before the decoder is trained."""
        inputs = [each.to(self.device, torch.float32) for each in frozen]
        if self._trained == "decoder":
            features = Features(*inputs)
        else:
            with self._autocast():
                levels = self.model.image_encoder.trunk(*inputs) if self._trained == "all" else inputs
                features = self._to_decoder(levels)
        image, fine, middle = features
        return Features(_channels_last(image), fine.contiguous(), _channels_last(middle))

    def decode(self, features: Features, image_of: Tensor, prompts: Prompts, *, multimask: bool) -> Decoded:
        """Return the masks of m prompts.

        `image_of`: (m,) int64, the place in `features` of each one's image.
        """
        encoder, decoder = self.model.sam_prompt_encoder, self.model.sam_mask_decoder
        first = int(image_of[0])
        if bool((image_of == first).all()):  # spread over the objects without a copy
            image, fine, middle = (each[first : first + 1] for each in features)
            image = image.expand(len(image_of), -1, -1, -1)
        else:
            image, fine, middle = (each[image_of.to(self.device)] for each in features)
        with self._autocast():
            sparse, dense = encoder(points=(prompts.points, prompts.kinds), boxes=None, masks=prompts.logits)
            logits, ious, _, object_score = decoder(
                image_embeddings=image,
                image_pe=self._positions,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
                repeat_image=False,
                high_res_features=[fine, middle],
            )
        return Decoded(logits.float(), ious.float(), object_score.float())

    def _to_decoder(self, levels: Sequence[Tensor]) -> Features:
        """Return the neck's output for the trunk's four levels, as `SAM2ImagePredictor` hands it on."""
        decoder = self.model.sam_mask_decoder
        fine, middle, coarse, _ = self.model.image_encoder.neck(list(levels))[0]
        image = coarse + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return Features(image, decoder.conv_s0(fine), decoder.conv_s1(middle))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)


def frozen_shapes(trained: Trained, model: SAM2Base, image_px: int) -> list[tuple[int, ...]]:
    """Return the shapes of one image's frozen output, each of float16; none where everything is trained."""
    edge = image_px // 16
    if trained == "decoder":
        return [(256, edge, edge), (32, 4 * edge, 4 * edge), (64, 2 * edge, 2 * edge)]
    if trained == "decoder+neck":
        widths = reversed(model.image_encoder.trunk.channel_list)
        return [(width, edge * 4 >> level, edge * 4 >> level) for level, width in enumerate(widths)]
    return []


def _lay_out(decoder: MaskDecoder, positions: Tensor) -> None:
    """Let each part of the decoder have its input in memory as it reads it: a sixth of the time, on a CPU.

    The transformer reads pixel by pixel, and the masks are drawn channel by channel.
    """
    positions = _channels_last(positions)

    def before_transformer(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        image, repeated, tokens = inputs
        return _channels_last(image), positions.expand_as(repeated), tokens

    def after_upscaling(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
        return output.contiguous()

    decoder.transformer.register_forward_pre_hook(before_transformer)
    decoder.output_upscaling[3].register_forward_hook(after_upscaling)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _is_trained(name: str, trained: Trained) -> bool:
    """Tell whether a parameter is; never one of those that only a video needs."""
    if name.startswith(("sam_mask_decoder.conv_s0.", "sam_mask_decoder.conv_s1.", "image_encoder.neck.")):
        return trained != "decoder"
    if name.startswith("image_encoder."):
        return trained == "all"
    return name.startswith(("sam_mask_decoder.", "sam_prompt_encoder."))
