"""Encoded images kept for the next question about them; the one asked about least recently goes first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

#: sha256 of the segmenter, sha256 of the encoded image.
Key = tuple[str, str]


@dataclass(frozen=True)
class Embedding:
    """An image as SAM2's decoder takes it; at 1024 px 16.8 MB in fp32, 10.5 MB in bf16."""

    #: (1, 256, 64, 64)
    image: torch.Tensor
    #: (1, 32, 256, 256) and (1, 64, 128, 128)
    high_resolution: tuple[torch.Tensor, torch.Tensor]

    @property
    def size_bytes(self) -> int:
        """Memory that keeping it takes: whole storages, also where a tensor is a view of a larger one."""
        storages = {
            storage.data_ptr(): storage.nbytes()
            for tensor in (self.image, *self.high_resolution)
            for storage in (tensor.untyped_storage(),)
        }
        return sum(storages.values())


class EmbeddingCache:
    """At most `limit_bytes` of embeddings, 0 for none; used by one thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[Key, Embedding] = OrderedDict()
        #: Memory of those that are kept.
        self.size_bytes = 0

    def get(self, key: Key) -> Embedding | None:
        """Return the embedding, if it is there; it is now the one used last."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Key, embedding: Embedding) -> None:
        """Keep an embedding, unless it alone is over the limit, and drop others until all fit."""
        if embedding.size_bytes > self._limit_bytes:
            return
        if replaced := self._kept.pop(key, None):
            self.size_bytes -= replaced.size_bytes
        self._kept[key] = embedding
        self.size_bytes += embedding.size_bytes
        while self.size_bytes > self._limit_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.size_bytes -= dropped.size_bytes

    def clear(self) -> None:
        """Drop all."""
        self._kept.clear()
        self.size_bytes = 0
