"""SAM2 on the boxes of an image: one encoding, nearly all of the cost, then a few boxes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sam2.modeling.sam2_base import SAM2Base
from torch.nn import functional

from rvmcv_worker.compute import file_hash, sam2_square
from rvmcv_worker.compute.embedding_cache import Embedding, EmbeddingCache
from rvmcv_worker.compute.sam2_checkpoint import open_sam2

#: Boxes decoded at once. What a box needs fills a CPU's cache: 2 take 27 ms a box, 8 take 45, 16 take 63.
_CHUNK = {"cpu": 2, "cuda": 16}


def open_segmenter(path: Path, *, device: str, cache: EmbeddingCache | None) -> Segmenter:
    """Return the SAM2 model at `path` on `device`, ``cpu`` or the index of a GPU; raise `ModelInvalidError`.

    A fine-tuned one is used as its file says: images stretched to the edge that it was trained at, and, where
    only ever the mask of a box was trained, without the decoder's other three.
    """
    model, _ = open_sam2(path)
    where = torch.device("cpu" if device == "cpu" else f"cuda:{device}")
    return Segmenter(model, file_hash.sha256(path), device=where, cache=cache)


class Segmenter:
    """A loaded SAM2 model; used by one thread."""

    def __init__(
        self, model: SAM2Base, sha256: str, *, device: torch.device, cache: EmbeddingCache | None
    ) -> None:
        self._model = model.to(device).requires_grad_(False)
        self._sha256 = sha256
        self._device = device
        self._cache = cache
        #: ``bf16`` where the hardware computes with it, else ``fp32``.
        self.precision = "bf16" if _has_bf16(device) else "fp32"
        #: Memory of the weights; encoding an image at 1024 px takes some 600 MB more for as long as it lasts.
        self.memory_bytes = sum(
            tensor.numel() * tensor.element_size() for tensor in self._model.state_dict().values()
        )

    def segment(
        self, image: NDArray[np.uint8], boxes: NDArray[np.float32], *, image_key: str
    ) -> Iterator[NDArray[np.bool_]]:
        """Yield a (height, width) mask for each box, in order, when it is asked for; none before is kept.

        `image`: (height, width, 3) BGR. `boxes`: (n, 4) ``x1, y1, x2, y2`` in its pixels. `image_key` is the
        same only for the same image.
        """
        height, width = image.shape[:2]
        for logits in self.logits(image, boxes, image_key=image_key):
            yield at_full_size(logits, (height, width))

    def logits(
        self, image: NDArray[np.uint8], boxes: NDArray[np.float32], *, image_key: str
    ) -> Iterator[torch.Tensor]:
        """Yield what each box's mask is made of, (edge / 4, edge / 4) float32; above 0 is the object."""
        if not len(boxes):
            return
        height, width = image.shape[:2]
        embedding = self._embedding(image, image_key)
        corners = torch.from_numpy(np.ascontiguousarray(boxes, np.float32)).to(self._device).reshape(-1, 2, 2)
        corners = corners / torch.tensor((width, height), device=self._device) * self._model.image_size
        for few in corners.split(_CHUNK[self._device.type]):
            yield from self._decode(embedding, few)

    def _embedding(self, image: NDArray[np.uint8], image_key: str) -> Embedding:
        key = (self._sha256, image_key)
        embedding = self._cache.get(key) if self._cache else None
        if embedding is None:
            embedding = self._encode(image)
            if self._cache:
                self._cache.put(key, embedding)
        return embedding

    @torch.inference_mode()
    def _encode(self, image: NDArray[np.uint8]) -> Embedding:
        """Return what `SAM2ImagePredictor.set_image` computes, bit for bit."""
        square = sam2_square.square(image, self._model.image_size, self._device)
        with self._autocast():
            fine, middle, coarse = self._model.forward_image(square[None])["backbone_fpn"]
        return Embedding(coarse + self._model.no_mem_embed.reshape(1, -1, 1, 1), (fine, middle))

    @torch.inference_mode()
    def _decode(self, embedding: Embedding, corners: torch.Tensor) -> torch.Tensor:
        """Return logits of n masks, (n, edge / 4, edge / 4) float32, for corners (n, 2, 2) in the square."""
        kinds = torch.tensor((2, 3), dtype=torch.int32, device=self._device).expand(len(corners), 2)
        prompts, decoder = self._model.sam_prompt_encoder, self._model.sam_mask_decoder
        with self._autocast():
            sparse, dense = prompts(points=(corners, kinds), boxes=None, masks=None)
            logits, _, _, _ = decoder(
                image_embeddings=embedding.image,
                image_pe=prompts.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
                repeat_image=True,
                high_res_features=list(embedding.high_resolution),
            )
        masks: torch.Tensor = logits[:, 0].float()
        return masks

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bf16")


@torch.inference_mode()
def at_full_size(logits: torch.Tensor, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask that the decoder's logits, (height, width), mean for an image of `size`."""
    full = functional.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)
    mask: NDArray[np.bool_] = (full[0, 0] > 0).cpu().numpy()
    return mask


def _has_bf16(device: torch.device) -> bool:
    """Tell whether `device` computes with bf16 itself; where it is imitated it is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
