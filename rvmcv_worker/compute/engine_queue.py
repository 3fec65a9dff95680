"""Requests on their way through an engine: who is next, and who may go together.

Interactive ones go first at every stage; within a queue the order is that of arrival. The reader puts
requests in, one decode thread turns their content into pixels, one compute thread takes the pixels out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rvmcv_worker.engine_wire import Queue, Request


@dataclass(frozen=True)
class Encoded:
    """A request as it came; times are of the queue's clock."""

    request: Request
    content: bytes
    arrived_s: float


@dataclass(frozen=True)
class Decoded:
    """A request whose image is decoded."""

    request: Request
    #: (height, width, 3) uint8, BGR, as a viewer shows it.
    image: NDArray[np.uint8]
    #: sha256 of the encoded image.
    image_key: str
    #: Waited until it was decoded, and decoded for so long.
    queued_s: float
    decode_s: float
    #: When it was ready, by the queue's clock.
    ready_s: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.shape[1], self.image.shape[0]


class EngineQueue:
    """Two queues for each of two stages.

    Of each queue at most `ahead` images are decoded and wait, of large ones so many that `ahead_bytes` are
    reached: memory stays flat, and a batch's images never keep an interactive one from being decoded.
    `max_batch` above 1 is for a GPU: images whose `group` is equal go together, and the first waits for
    others at most `window_s` after it was ready, and only while requests of its queue are on their way.
    """

    def __init__(
        self,
        *,
        ahead: int,
        ahead_bytes: int = 512 * 1024**2,
        max_batch: int = 1,
        window_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._ahead = ahead
        self._ahead_bytes = ahead_bytes
        self._max_batch = max_batch
        self._window_s = window_s
        self._encoded: dict[Queue, deque[Encoded]] = {queue: deque() for queue in Queue}
        self._decoded: dict[Queue, deque[Decoded]] = {queue: deque() for queue in Queue}
        self._decoding: Queue | None = None
        self._changed = threading.Condition()

    def put(self, request: Request, content: bytes) -> None:
        """Add a request that came."""
        with self._changed:
            self._encoded[request.queue].append(Encoded(request, content, self.clock()))
            self._changed.notify_all()

    def put_decoded(self, decoded: Decoded | None) -> None:
        """Add what became of the request that was taken last to be decoded; None if it has ended."""
        with self._changed:
            self._decoding = None
            if decoded:
                self._decoded[decoded.request.queue].append(decoded)
            self._changed.notify_all()

    def take_encoded(self) -> Encoded:
        """Wait for the next request to decode, for whose image there must be room."""
        with self._changed:
            while (encoded := self.pick_encoded()) is None:
                self._changed.wait()
            return encoded

    def take_batch(self, group: Callable[[Decoded], Hashable]) -> list[Decoded]:
        """Wait for the next images to compute; all have the same `group`."""
        with self._changed:
            while True:
                batch, wait_s = self.pick_batch(group)
                if batch:
                    self._changed.notify_all()  # there is room to decode again
                    return batch
                self._changed.wait(wait_s)

    def pick_encoded(self) -> Encoded | None:
        """Take the next request to decode, if there is one and room for its image."""
        for queue in Queue:
            if self._encoded[queue] and self._has_room(queue):
                self._decoding = queue
                return self._encoded[queue].popleft()
        return None

    def _has_room(self, queue: Queue) -> bool:
        waiting = self._decoded[queue]
        return len(waiting) < self._ahead and sum(item.image.nbytes for item in waiting) < self._ahead_bytes

    def pick_batch(self, group: Callable[[Decoded], Hashable]) -> tuple[list[Decoded], float | None]:
        """Take the next images to compute.

        Without any, the second value says in how many seconds to ask again; None is "when something comes".
        """
        for queue in Queue:
            waiting = self._decoded[queue]
            if not waiting:
                continue
            first = waiting[0]
            if self._max_batch == 1:
                return [waiting.popleft()], None
            wanted = group(first)
            batch = [item for item in waiting if group(item) == wanted][: self._max_batch]
            more_to_come = bool(self._encoded[queue]) or self._decoding is queue
            no_room = len(batch) == self._max_batch or not self._has_room(queue)
            wait_s = first.ready_s + self._window_s - self.clock()
            if more_to_come and not no_room and wait_s > 0:
                return [], wait_s
            taken = {id(item) for item in batch}
            self._decoded[queue] = deque(item for item in waiting if id(item) not in taken)
            return batch, None
        return [], None
