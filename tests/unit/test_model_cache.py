"""Which models leave memory when it is short."""

from __future__ import annotations

import errno
import mmap
from dataclasses import dataclass

import pytest

from rvmcv_worker.compute.model_cache import ModelCache, resident_bytes
from rvmcv_worker.errors import ModelInvalidError


@dataclass
class Model:
    name: str
    memory_bytes: int = 10


class Memory:
    """A process whose resident memory is a base and what was loaded, until it is given back."""

    def __init__(self, base_bytes: int = 0) -> None:
        self.resident_bytes = base_bytes
        self.loads: list[str] = []
        self.given_back = 0

    def resident(self) -> int:
        return self.resident_bytes

    def give_back(self) -> None:
        self.given_back += 1
        self.resident_bytes -= 10

    def load(self, name: str) -> Model:
        self.loads.append(name)
        self.resident_bytes += 10
        return Model(name)


def cache_of(memory: Memory, limit_bytes: int, *names: str) -> ModelCache:
    cache = ModelCache(limit_bytes, resident=memory.resident, give_back=memory.give_back)
    for name in names:
        cache.get(name, lambda name=name: memory.load(name))
    return cache


def test_a_model_is_loaded_once_while_there_is_room() -> None:
    memory = Memory()
    cache = cache_of(memory, 30, "a", "b", "a")
    assert memory.loads == ["a", "b"]
    assert cache.trim(["a"]) == []


def test_the_model_used_least_recently_goes_first_and_no_more_than_must() -> None:
    cache = cache_of(Memory(), 25, "a", "b", "a", "c")
    assert cache.trim(["c"]) == ["b"]
    assert [name in cache for name in "abc"] == [True, False, True]


def test_models_in_use_never_go_however_short_memory_is() -> None:
    cache = cache_of(Memory(), 5, "a", "b", "c")
    assert cache.trim(["a", "c"]) == ["b"]
    assert cache.trim(["a", "c"]) == []


def test_resident_memory_counts_where_estimates_are_too_low() -> None:
    memory = Memory(base_bytes=100)
    cache = cache_of(memory, 125, "a", "b", "c")
    assert cache.trim(["c"]) == ["a"]
    assert memory.given_back == 1


def test_all_but_those_in_use_can_be_dropped_and_come_back_when_they_are_asked_for() -> None:
    memory = Memory()
    cache = cache_of(memory, 100, "a", "b", "c")
    cache.drop_all_but(["b"])
    assert [cache.peek(name) is not None for name in "abc"] == [False, True, False]
    assert cache.get("a", lambda: memory.load("a")) == Model("a")
    assert memory.loads == ["a", "b", "c", "a"]


def test_a_model_that_does_not_load_leaves_nothing_behind() -> None:
    cache = cache_of(Memory(), 100, "a")
    with pytest.raises(ZeroDivisionError):
        cache.get("bad", lambda: Model("bad", 1 // 0))
    assert "bad" not in cache
    assert "a" in cache


def test_what_is_resident_is_what_the_kernel_says() -> None:
    before = resident_bytes()
    with mmap.mmap(-1, 64_000_000) as held:  # memory of its own: a process may have some to spare
        held.write(b"\x01" * len(held))
        assert 50_000_000 < resident_bytes() - before < 200_000_000


def test_a_model_that_is_none_is_tried_once() -> None:
    memory = Memory()
    cache = cache_of(memory, 30)

    def load() -> Model:
        memory.loads.append("bad")
        raise ModelInvalidError("is no checkpoint")

    for _ in range(3):
        with pytest.raises(ModelInvalidError, match="is no checkpoint"):
            cache.get("bad", load)
    assert memory.loads == ["bad"]
    assert "bad" not in cache


@pytest.mark.parametrize("cause", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_a_model_that_is_hardly_at_fault_is_tried_again(cause: Exception) -> None:
    memory = Memory()
    cache = cache_of(memory, 30)

    def load() -> Model:
        raise ModelInvalidError("does not load") from cause

    with pytest.raises(ModelInvalidError):
        cache.get("large", load)
    assert cache.get("large", lambda: memory.load("large")).name == "large"


def test_of_models_that_are_none_not_all_are_remembered() -> None:
    memory = Memory()
    cache = cache_of(memory, 30)
    loads = []

    def load(name: int) -> Model:
        loads.append(name)
        raise ModelInvalidError("is no checkpoint")

    for name in (*range(1000), 999, 0):
        with pytest.raises(ModelInvalidError):
            cache.get(name, lambda name=name: load(name))
    assert loads == [*range(1000), 0]
