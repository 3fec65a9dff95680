"""What is kept of encoded images, and what has to go."""

from __future__ import annotations

import torch

from rvmcv_worker.compute.embedding_cache import Embedding, EmbeddingCache

ONE_BYTES = 4 * (256 + 32 + 64)


def _embedding(number: float = 0.0) -> Embedding:
    image = torch.full((1, 256, 1, 1), number)
    return Embedding(image, (torch.zeros(1, 32, 1, 1), torch.zeros(1, 64, 1, 1)))


def test_the_one_asked_about_least_recently_goes_first() -> None:
    cache = EmbeddingCache(2 * ONE_BYTES)
    first, second, third = (_embedding(number) for number in (1.0, 2.0, 3.0))
    cache.put(("s", "a"), first)
    cache.put(("s", "b"), second)
    assert cache.get(("s", "a")) is first
    cache.put(("s", "c"), third)
    assert cache.get(("s", "b")) is None
    assert (cache.get(("s", "a")), cache.get(("s", "c"))) == (first, third)
    assert cache.size_bytes == 2 * ONE_BYTES


def test_the_same_image_of_another_model_is_another_one() -> None:
    cache = EmbeddingCache(10 * ONE_BYTES)
    cache.put(("s", "a"), _embedding())
    assert cache.get(("t", "a")) is None


def test_zero_keeps_nothing() -> None:
    cache = EmbeddingCache(0)
    cache.put(("s", "a"), _embedding())
    assert (cache.get(("s", "a")), cache.size_bytes) == (None, 0)


def test_one_that_is_too_large_drops_no_other() -> None:
    cache = EmbeddingCache(ONE_BYTES)
    cache.put(("s", "a"), kept := _embedding())
    cache.put(("s", "b"), Embedding(torch.zeros(1, 256, 2, 2), kept.high_resolution))
    assert (cache.get(("s", "a")), cache.get(("s", "b"))) == (kept, None)


def test_put_again_it_is_counted_once() -> None:
    cache = EmbeddingCache(3 * ONE_BYTES)
    for _ in range(5):
        cache.put(("s", "a"), _embedding())
    assert cache.size_bytes == ONE_BYTES


def test_memory_that_a_view_holds_is_counted_whole_and_once() -> None:
    whole = torch.zeros(1000, 256)
    view = Embedding(whole[:1].reshape(1, 256, 1, 1), (whole[1:2], whole[2:3]))
    assert view.size_bytes == 4 * 256_000


def test_cleared_it_is_empty() -> None:
    cache = EmbeddingCache(2 * ONE_BYTES)
    cache.put(("s", "a"), _embedding())
    cache.clear()
    assert (cache.get(("s", "a")), cache.size_bytes) == (None, 0)
