"""What the frozen part of a network makes of a split's images, kept for all epochs: it is most of the work.

It is always float16 (as `Network.frozen` makes it), kept or not: keeping changes nothing but the time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from rvmcv_worker.compute.child import NO_ROOM
from rvmcv_worker.compute.entry_store import Entry, EntryStore, FileStore, MemoryStore
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Network, frozen_shapes
from rvmcv_worker.compute.sam2_samples import Flip, Samples
from rvmcv_worker.errors import ModelInvalidError
from rvmcv_worker.in_order import in_order
from rvmcv_worker.sam2_options import Sam2Options

#: An image of the split by its number, and how it is mirrored.
Key = tuple[int, Flip]

#: Share of the memory that is left which `ram` may fill, and up to which `auto` takes it instead of a file: a
#: file's pages are as near while the machine has memory to spare, and go first when it has not.
_RAM_SHARE, _AUTO_SHARE = 0.5, 0.1
#: Most images encoded at once, on a GPU: more of them save no time and wait in memory as squares.
_MOST_AT_ONCE = 8
#: Threads that make squares while a GPU encodes: it encodes one in less time than a thread decodes one.
_THREADS = 4
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Loaded:
    """What a few keys need of the processor: the outputs that are kept, and squares of the others."""

    #: Each (n, …) float16; without content in the places of `squares`. Pinned where the network is on a GPU.
    outputs: tuple[Tensor, ...]
    #: Place -> (3, px, px)
    squares: dict[int, Tensor]


class Embeddings:
    """The frozen output of a split's images, each by its key; kept in a file, in memory, or not at all.

    One thread may `load` while another uses the network. A context manager: what is kept ends with it.
    """

    def __init__(
        self,
        samples: Samples,
        network: Network,
        memory: Memory,
        options: Sam2Options,
        wanted: Sequence[Key],
        *,
        path: Path,
        limit_bytes: int,
        memory_limit_bytes: int | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """Decide where to keep what; `fill` does it.

        `wanted`: what will be asked for, what is asked for most often first. `path` is where a file would be,
        of at most `limit_bytes`. `memory_limit_bytes`: what the job's processes may hold together.
        `check_stop` is asked before each image, or few on a GPU, that is encoded.
        """
        self._samples = samples
        self._network = network
        self._memory = memory
        self._wanted = list(wanted)
        self._path = path
        self._check_stop = check_stop
        self._shapes = frozen_shapes(options.train, network.model, network.image_px)
        self._entry_size = sum(int(np.prod(shape)) for shape in self._shapes)
        self._entry_bytes = 2 * self._entry_size
        memory_left_bytes = _memory_left_bytes(memory_limit_bytes)
        #: ``disk``, ``ram`` or ``off``.
        self.mode = self._choose(options.cache, memory_left_bytes)
        if self.mode == "ram":
            limit_bytes = int(_RAM_SHARE * memory_left_bytes)
        #: How many of `wanted` there is room for.
        self.planned = 0
        if self.mode != "off":
            self.planned = min(len(self._wanted), max(0, limit_bytes) // self._entry_bytes)
        self._kept: dict[Key, int] = {}
        self._clamped: set[Key] = set()
        self._store: EntryStore | None = None
        self._no_room = False

    def __enter__(self) -> Embeddings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def network(self) -> Network:
        """The network whose frozen output it is."""
        return self._network

    @property
    def kept_bytes(self) -> int:
        """What is kept takes."""
        return len(self._kept) * self._entry_bytes

    def fill(self, tick: Callable[[int, int, float], None]) -> None:
        """Encode all that there is room for.

        `tick` is told how many are done, of how many, and how many seconds the rest will take. A full disk
        ends the filling, and not the training, which gets half of the room back.
        """
        begun_s = time.monotonic()
        planned = sorted(self._wanted[: self.planned])
        keys = [key for key in planned if key not in self._kept]
        if not keys:
            return
        self._store = self._store or self._open_store()
        done = 0
        with contextlib.closing(self._encoded_in_turn(keys)) as encoded:
            for few, outputs in encoded:
                for key, output in zip(few, outputs, strict=True):
                    entry = torch.cat([part.flatten() for part in output]).cpu().numpy()
                    if not self._keep(key, entry):
                        return
                done += len(few)
                tick(done, len(keys), (time.monotonic() - begun_s) / done * (len(keys) - done))

    def get(self, index: int, flip: Flip) -> tuple[Tensor, ...]:
        """Return an image's frozen output, on the network's device."""
        return tuple(part[0] for part in self.batch([(index, flip)]))

    def batch(self, keys: Sequence[Key]) -> tuple[Tensor, ...]:
        """Return the frozen outputs of a few images, each (n, …), on the network's device."""
        return self.finish(keys, self.load(keys))

    def load(self, keys: Sequence[Key]) -> Loaded:
        """Read what is kept, and make squares of the rest; without the network, on any one thread."""
        on_gpu = self._network.device.type == "cuda"
        places = {place: self._kept[key] for place, key in enumerate(keys) if key in self._kept}
        if self._store:
            self._store.expect(list(places.values()))
        squares = {place: self._samples.square(*key) for place, key in enumerate(keys) if place not in places}
        outputs = tuple(
            torch.empty((len(keys), *shape), dtype=torch.float16, pin_memory=on_gpu) for shape in self._shapes
        )
        for place, number in places.items():
            assert self._store is not None
            self._copy(self._store.read(number), outputs, place)
        return Loaded(outputs, squares)

    def finish(self, keys: Sequence[Key], loaded: Loaded) -> tuple[Tensor, ...]:
        """Encode what is not there yet; return what `batch` does."""
        if not self._shapes:
            return self._network.frozen(torch.stack([loaded.squares[place] for place in range(len(keys))]))
        outputs = tuple(part.to(self._network.device, non_blocking=True) for part in loaded.outputs)
        missing = list(loaded.squares)
        encoded = self._encode([keys[place] for place in missing], list(loaded.squares.values()))
        for place, output in zip(missing, encoded, strict=True):
            for whole, part in zip(outputs, output, strict=True):
                whole[place] = part
        return outputs

    def describe(self) -> dict[str, Any]:
        """Return what was chosen, for a result's `effective`."""
        return {
            "mode": self.mode,
            "kept": len(self._kept),
            "wanted": len(self._wanted),
            "bytes": self.kept_bytes,
            **({"clamped": len(self._clamped)} if self._clamped else {}),
        }

    def sentence(self) -> str:
        """Say the same to a person."""
        each_time = f"every image of {self._samples.split} is encoded each time"
        if self.mode == "off":
            return each_time
        where = "in memory" if self.mode == "ram" else "on disk"
        if not self._kept:
            return f"{each_time}: there is no room to keep any {where}"
        size = (
            f"{self.kept_bytes / 1e9:.3g} GB" if self.kept_bytes >= 1e9 else f"{self.kept_bytes / 1e6:.3g} MB"
        )
        if len(self._kept) == len(self._wanted):
            return f"all {len(self._kept)} encoded images of {self._samples.split} are kept {where} ({size})"
        why = "more does not fit" if not self._no_room else "the disk is full"
        return (
            f"{len(self._kept)} of {len(self._wanted)} encoded images of {self._samples.split} are kept "
            f"{where} ({size}; {why}), the others are encoded each time"
        )

    def close(self) -> None:
        """Keep nothing any more, and remove the file."""
        self._kept.clear()
        if self._store:
            self._store.close()
            self._store = None

    def _choose(self, mode: str, memory_left_bytes: int) -> str:
        if not self._shapes:
            return "off"
        if mode == "auto":
            small = len(self._wanted) * self._entry_bytes <= _AUTO_SHARE * memory_left_bytes
            return "ram" if small else "disk"
        return mode

    def _open_store(self) -> EntryStore:
        return MemoryStore() if self.mode == "ram" else FileStore(self._path, self._entry_size)

    def _keep(self, key: Key, entry: Entry) -> bool:
        """Keep an entry; false where there is no room any more."""
        assert self._store is not None
        try:
            self._store.append(entry)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._no_room = True
            self._give_half_back()
            return False
        self._kept[key] = len(self._kept)
        return True

    def _give_half_back(self) -> None:
        """Forget half of what is kept: what is saved after each epoch is to fit onto the disk too."""
        assert self._store is not None
        count = len(self._kept) // 2
        self._store.truncate(count)
        self._kept = {key: number for key, number in self._kept.items() if number < count}

    def _copy(self, entry: Entry, outputs: tuple[Tensor, ...], place: int) -> None:
        """Copy a flat entry into a place of (n, …) outputs."""
        start = 0
        for output in outputs:
            whole = output[place].numpy().reshape(-1)
            whole[:] = entry[start : start + whole.size]
            start += whole.size

    def _encoded_in_turn(
        self, keys: list[Key]
    ) -> Generator[tuple[list[Key], list[tuple[Tensor, ...]]], None, None]:
        """Yield a few keys and their frozen outputs, till all are done; each image is decoded once."""
        few: list[Key] = []
        squares: list[Tensor] = []
        images = [(index, list(mirrored)) for index, mirrored in groupby(keys, key=lambda key: key[0])]
        with contextlib.closing(self._made([index for index, _ in images])) as made:
            for (_, mirrored), upright in zip(images, made, strict=True):
                for key in mirrored:
                    few.append(key)
                    squares.append(key[1].apply(upright))
                    if len(few) >= self._at_once():
                        yield few, self._encode(few, squares)
                        few, squares = [], []
        if few:
            yield few, self._encode(few, squares)

    def _made(self, indices: list[int]) -> Generator[Tensor, None, None]:
        """Yield images' squares; those that a GPU is to have next are made meanwhile."""
        if self._network.device.type == "cuda":
            return in_order(self._samples.square, indices, threads=_THREADS)
        return (self._samples.square(index) for index in indices)

    def _at_once(self) -> int:
        # On a CPU an image's output depends on its company, to rounding; a training that goes on, with other
        # ones to encode, is to be the one in a piece to the bit.
        if self._network.device.type == "cpu":
            return 1
        return min(self._memory.images_at_once, _MOST_AT_ONCE)

    def _encode(self, keys: Sequence[Key], squares: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return the frozen output of each square."""
        encoded: list[tuple[Tensor, ...]] = []
        while len(encoded) < len(squares):
            self._check_stop()
            done = len(encoded)

            def of_a_few(done: int = done) -> tuple[Tensor, ...]:
                return self._network.frozen(torch.stack(list(squares[done : done + self._at_once()])))

            parts = self._memory.attempt(of_a_few, decodes=False)
            encoded += zip(*(part.unbind() for part in parts), strict=True)
        for key, output in zip(keys, encoded, strict=True):
            self._look_at(key, output)
        return encoded

    def _look_at(self, key: Key, output: tuple[Tensor, ...]) -> None:
        """Note an output beyond float16's range; raise `ModelInvalidError` for one that is no number."""
        largest = torch.stack([part.abs().max() for part in output]).max().item()  # NaN goes through `max`
        if np.isnan(largest):
            path = self._samples.labelled(key[0]).path
            raise ModelInvalidError(
                f"the model's encoder makes of {path} what are no numbers (NaN); use another base model"
            )
        if largest >= _HALF_MAX:
            self._clamped.add(key)


def _memory_left_bytes(limit_bytes: int | None) -> int:
    """Return what memory this process can still take without hurting the machine or the job's limit."""
    left = psutil.virtual_memory().available
    if limit_bytes is not None:
        held = psutil.Process().memory_info()
        left = min(left, max(0, limit_bytes - (held.rss - held.shared)))
    return left
